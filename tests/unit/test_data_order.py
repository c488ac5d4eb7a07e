"""Which files a data set is made of, in which order."""

import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hetermoe.config.errors import UsageError
from megatron_hetermoe.mcore.data import existing, sources, stdlib_sources


def make(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def test_folders_are_sorted_and_files_keep_their_place(tmp_path):
    make(tmp_path, "z.txt", "d/b.py", "d/a.txt", "d/sub/c.py", "d/a.py")
    found = sources([tmp_path / "z.txt", tmp_path / "d"], "*.py")
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["z.txt", "d/a.py", "d/b.py", "d/sub/c.py"]


@given(st.lists(st.sampled_from(["a.py", "b/x.py", "b/y.py", "b"]), min_size=1))
def test_every_file_once_where_it_came_first(tmp_path_factory, names):
    root = tmp_path_factory.mktemp("order")
    make(root, "a.py", "b/x.py", "b/y.py")
    found = [path.relative_to(root).as_posix() for path in sources([root / name for name in names])]
    expected = [file for name in names for file in (["b/x.py", "b/y.py"] if name == "b" else [name])]
    assert found == list(dict.fromkeys(expected))


def test_all_that_is_missing_is_named(tmp_path):
    make(tmp_path, "d/a.py")
    with pytest.raises(UsageError) as caught:
        sources([tmp_path / "x", tmp_path / "d", tmp_path / "y"], "*.txt")
    assert len(caught.value.problems) == 3


def test_stdlib():
    root = Path(sysconfig.get_path("stdlib"))
    found = [path.relative_to(root).as_posix() for path in stdlib_sources()]
    assert len(found) > 400 and {"ast.py", "json/decoder.py"} <= set(found)
    assert not any(part in name.split("/") for name in found for part in ("site-packages", "test", "tests"))
    assert found == [Path(*parts).as_posix() for parts in sorted(Path(name).parts for name in found)]


def test_a_data_set_is_there_when_both_files_are(tmp_path):
    make(tmp_path, "p.bin")
    assert existing(tmp_path / "p") is None
    make(tmp_path, "p.idx")
    assert existing(tmp_path / "p") == len("p.bin") // 2
