"""Text files as bytes in Megatron's indexed format: a data set that every machine has, without a tokenizer to fetch.

A token is a byte, 0 to 255; a document ends with END_OF_DOCUMENT. Megatron's NullTokenizer ends a document with the
last id of its vocabulary, so this data is trained with ``--tokenizer-type NullTokenizer --vocab-size 257``.
"""

from __future__ import annotations

import logging
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.mcore.dataset_files import DatasetFiles

END_OF_DOCUMENT = 256
VOCAB_SIZE = 257
TOKEN_BYTES = 2  # uint16

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Totals:
    """What was written: documents, tokens with the ends of documents, and bytes of text."""

    documents: int
    tokens: int
    bytes: int


def stdlib_sources() -> list[Path]:
    """The .py files of the running Python's standard library, sorted, without its tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    return [path for path in _files_below(root, "*.py") if not _NOT_LIBRARY & set(path.relative_to(root).parts[:-1])]


def sources(paths: Iterable[str | Path], glob: str = "*") -> list[Path]:
    """The files that are meant by files and folders.

    Args:
        paths: files, taken as they are, and folders, of which all files below that match are taken, sorted.
        glob: pattern for the names of files in folders.

    Returns:
        The files in the order of ``paths``, each once.

    Raises:
        UsageError: with every path that is not there and every folder in which nothing matches.
    """
    problems = Problems()
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = _files_below(path, glob)
            if not inside:
                problems.add(f"no file in {path} matches {glob!r}; give another --glob")
            found |= dict.fromkeys(inside)
        elif path.is_file():
            found[path] = None
        else:
            problems.add(f"{path} is not there")
    problems.raise_if_any()
    return list({path.resolve(): path for path in reversed(found)}.values())[::-1]


def _files_below(root: Path, glob: str) -> list[Path]:
    return sorted((path for path in root.rglob(glob) if path.is_file()), key=lambda path: path.relative_to(root).parts)


def existing(prefix: str | Path) -> int | None:
    """Number of tokens in the data set with this prefix, None if there is no complete one."""
    data, index = (Path(f"{prefix}{end}") for end in (".bin", ".idx"))
    return data.stat().st_size // TOKEN_BYTES if data.is_file() and index.is_file() else None


def write_dataset(files: Sequence[Path], prefix: str | Path,
                  advance: Callable[[int], None] = lambda size: None) -> Totals:
    """Writes files, each one document, as ``PREFIX.bin`` and ``PREFIX.idx``.

    The data set appears when it is complete: it is written under other names and then moved.

    Args:
        files: in the order in which they are written.
        prefix: path without the endings; its folder is made.
        advance: called after each file with its size in bytes.

    Raises:
        UsageError: if a file cannot be read or the data set not be written.
    """
    numpy, builder_of = import_builder()
    staged, read = None, 0
    try:
        staged = DatasetFiles(prefix)
        builder = builder_of(str(staged.bin), dtype=numpy.uint16)
        for path in files:
            text = path.read_bytes()
            tokens = numpy.empty(len(text) + 1, numpy.uint16)
            tokens[:-1] = numpy.frombuffer(text, numpy.uint8)
            tokens[-1] = END_OF_DOCUMENT
            builder.add_document(tokens, [len(tokens)])
            read += len(text)
            advance(len(text))
        builder.finalize(str(staged.idx))
        staged.sync()
        staged.publish()
    except OSError as error:
        raise UsageError([f"cannot write {prefix}: {error.strerror} ({error.filename})"]) from None
    finally:
        if staged:
            staged.discard()
    return Totals(len(files), read + len(files), read)


def import_builder():
    """numpy and Megatron's builder, imported late: it takes seconds, and what goes before needs neither."""
    with warnings.catch_warnings():
        # of what Megatron and torch find missing, nothing is needed here
        warnings.simplefilter("ignore")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        import numpy
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    return numpy, IndexedDatasetBuilder
