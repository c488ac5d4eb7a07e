"""``hetermoe data`` with a tokeniser: what is written, and that nothing is when something is wrong."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_hetermoe.cli.main import main

NULL = ["--", "--tokenizer-type", "NullTokenizer", "--vocab-size", "70"]
ROWS = [[1, 2, 3], [4], [5, 6]]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def documents(prefix):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return [dataset[index].tolist() for index in range(len(dataset))]


def test_each_kind_of_file_holds_the_same_documents(here):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [" ".join(map(str, row)) for row in ROWS]
    (here / "a.jsonl").write_bytes(lines(*texts))
    (here / "b.jsonl.gz").write_bytes(gzip.compress(lines(*texts)))
    table = arrow.table({"text": texts})
    parquet.write_table(table, here / "c.parquet")
    for name, writer in (("d.arrow", arrow.ipc.new_stream), ("e.arrow", arrow.ipc.new_file)):
        with writer(here / name, table.schema) as file:
            file.write_table(table)
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.arrow", "e.arrow"):
        assert main(["data", "--out", f"out/{name}", "--workers", "1", "--append-eod", name, *NULL]) == 0
        assert documents(here / "out" / name) == [[*row, 69] for row in ROWS], name


def test_workers_change_no_byte(here):
    (here / "a.jsonl").write_bytes(lines(*(" ".join(str(j % 60) for j in range(1 + i % 900)) for i in range(2500))))
    (here / "b.txt").write_text("7 8")
    for workers in ("1", "2"):
        assert main(["data", "--out", workers, "--workers", workers, "a.jsonl", "b.txt", *NULL]) == 0
    for end in (".bin", ".idx"):
        assert (here / f"1{end}").read_bytes() == (here / f"2{end}").read_bytes()
    assert documents(here / "2")[-1] == [7, 8]


def test_all_that_is_wrong_is_said_and_nothing_is_written(here, capsys):
    bad = b'{"txt": "1"}\n{"text": "1"\n\xff\n[1]\n{"text": 3}\n{"text": "one"}\n{"text": "70"}\n'
    (here / "bad.jsonl").write_bytes(lines("1") + bad)
    assert main(["data", "--out", "out/x", "--workers", "1", "bad.jsonl", *NULL]) == 2
    said = capsys.readouterr().err
    for part in ("bad.jsonl:2: there is no key text; did you mean txt?", "bad.jsonl:3: no JSON", "bad.jsonl:4: not UTF-8",
                 "bad.jsonl:5: a line has to be", "bad.jsonl:6: text is no text", "bad.jsonl:7: cannot be tokenised",
                 "bad.jsonl:8: cannot be tokenised: a token is not in the vocabulary of 70", "7 problems"):
        assert part in said
    assert not list((here / "out").iterdir())


def test_what_can_be_known_before_is_refused_together(here, capsys):
    (here / "empty.jsonl").touch()
    (here / "x.bin").touch()
    argv = ["data", "--out", "x", "--workers", "0", "empty.jsonl", "--", "--tokenizer-type", "NullTokenizer", "--wrong"]
    assert main(argv) == 2
    said = capsys.readouterr().err
    for part in ("x.bin is there already; --overwrite", "empty.jsonl is empty", "--workers must be", "needs --vocab-size",
                 "no flags of Megatron's tokenizers: --wrong"):
        assert part in said


@pytest.mark.parametrize("number, code", [
    pytest.param(signal.SIGTERM, 143, id="SIGTERM"), pytest.param(signal.SIGINT, 130, id="SIGINT", marks=pytest.mark.slow),
])
def test_a_signal_ends_it_and_its_workers_and_leaves_nothing(here, number, code):
    """As a terminal sends it, to all processes of the command; it has hours to do."""
    member = gzip.compress(lines(*[" ".join(str(i % 60) for i in range(20_000))] * 50))
    (here / "long.jsonl.gz").write_bytes(member * 2000)
    argv = ["data", "--out", "out/x", "--workers", "2", "long.jsonl.gz", *NULL]
    command = subprocess.Popen([sys.executable, "-m", "megatron_hetermoe", *argv], start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    try:
        while not any(path.stat().st_size for path in here.glob("out/x.part-*.bin")):
            assert command.poll() is None, command.stdout.read()
            time.sleep(0.05)
        os.killpg(command.pid, number)
        said, _ = command.communicate(timeout=60)
        assert command.returncode == code, said
        assert "Traceback" not in said
        assert not list((here / "out").iterdir())
        while _members(command.pid):  # those that the workers were started by go when they notice
            time.sleep(0.05)
    finally:
        for pid in _members(command.pid):
            os.kill(pid, signal.SIGKILL)


def _members(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of_session = path.read_text(errors="replace").rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(of_session) == session and state != "Z":
            found.append(int(path.parent.name))
    return found
