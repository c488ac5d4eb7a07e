"""Documents in files: plain text, JSON lines, and the Parquet and Arrow files of Hugging Face datasets.

Files are read in order, by one process, as chunks that others turn into documents: a chunk of JSON lines is not parsed
where it is read.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.recipe import hint

CHUNK = 1 << 20  # bytes of JSON lines read together
ROWS = 512  # rows of a table read together
INSTALL = "pip install 'megatron-hetermoe[data]'"

_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_TABLES = (".parquet", ".arrow")
KNOWN = (".txt", *_LINES, *_TABLES)
_ABOUT_DATASETS = {"dataset_info.json", "state.json", "dataset_dict.json"}  # what save_to_disk adds to its files


@dataclass(frozen=True)
class Chunk:
    """Some documents of one file.

    Attributes:
        origin: the file.
        first: number of the first line or row, from 1.
        content: JSON lines or a whole text as bytes, or for each key the column's values.
        bytes: how far the file was read for it.
    """

    origin: str
    first: int
    content: bytes | dict[str, list]
    bytes: int


def files_of(paths: Iterable[Path], named: Iterable[str], keys: Sequence[str]) -> list[Path]:
    """The files among ``paths`` that hold documents, all of them checked as far as their heads tell.

    Args:
        paths: files, those found in folders too.
        named: those that the user named one by one: their ending must be one of KNOWN, others are passed over.
        keys: keys of JSON objects, columns of tables.

    Raises:
        UsageError: with each file that cannot be read, is empty, or lacks a column, and if none is left.
    """
    problems = Problems()
    explicit = set(map(str, named))
    files = []
    for path in paths:
        if str(path) not in explicit and (path.name in _ABOUT_DATASETS or not path.name.endswith(KNOWN)):
            continue
        files.append(path)
        if not path.name.endswith(KNOWN):
            problems.add(f"{path}: the ending says what a file holds, and is one of {', '.join(KNOWN)}")
        elif path.stat().st_size == 0:
            problems.add(f"{path} is empty")
        elif path.suffix in _TABLES:
            _check_table(path, keys, problems)
        elif path.suffix == ".txt" and len(keys) > 1:
            problems.add(f"{path}: a text file has no keys, so give at most one --json-key")
    if not files:
        problems.add(f"no file ends in {', '.join(KNOWN)}")
    problems.raise_if_any()
    return files


def _check_table(path: Path, keys: Sequence[str], problems: Problems) -> None:
    try:
        import pyarrow
    except ImportError:
        problems.add(f"Parquet and Arrow files need pyarrow: {INSTALL}")
        return
    try:
        schema = _schema(path)
    except (pyarrow.ArrowException, OSError) as error:
        problems.add(f"{path} cannot be read: {' '.join(str(error).split())}")
        return
    for key in keys:
        if key not in schema.names:
            problems.add(f"{path} has no column {key}{hint(key, schema.names)}; it has {', '.join(schema.names)}")


def _schema(path: Path):
    import pyarrow

    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_schema(path)
    with pyarrow.memory_map(str(path)) as source:
        return _arrow_batches(source)[0]


def _arrow_batches(source):
    """Schema and record batches of an Arrow file: Hugging Face writes streams, others write the random-access form."""
    import pyarrow

    if source.read(6) == b"ARROW1":
        reader = pyarrow.ipc.open_file(source)
        return reader.schema, (reader.get_batch(index) for index in range(reader.num_record_batches))
    source.seek(0)
    reader = pyarrow.ipc.open_stream(source)
    return reader.schema, iter(reader)


def chunks(path: Path, keys: Sequence[str]) -> Iterator[Chunk]:
    """A file's chunks, in its order.

    Raises:
        UsageError: if it cannot be read to its end.
    """
    try:
        if path.suffix == ".txt":
            content = path.read_bytes()
            yield Chunk(str(path), 1, content, len(content))
        elif path.suffix in _TABLES:
            yield from _rows(path, keys)
        else:
            yield from _lines(path)
    except (OSError, EOFError, ValueError) as error:
        raise UsageError([f"{path} cannot be read: {' '.join(str(error).split())}"]) from None


def _lines(path: Path) -> Iterator[Chunk]:
    number, done = 1, 0
    with path.open("rb") as raw:
        file = gzip.open(raw) if path.suffix == ".gz" else raw
        while lines := file.readlines(CHUNK):
            yield Chunk(str(path), number, b"".join(lines), raw.tell() - done)
            number, done = number + len(lines), raw.tell()


def _rows(path: Path, keys: Sequence[str]) -> Iterator[Chunk]:
    import pyarrow

    columns = list(dict.fromkeys(keys))
    number, done = 1, 0
    with pyarrow.memory_map(str(path)) as source:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            file = pyarrow.parquet.ParquetFile(source)
            total = file.metadata.num_rows
            batches = file.iter_batches(ROWS, columns=columns)
        else:
            total = None
            batches = (batch.slice(start, ROWS) for batch in _arrow_batches(source)[1]
                       for start in range(0, len(batch), ROWS))
        for batch in batches:
            read = source.size() * (number - 1 + len(batch)) // total if total else source.tell()
            yield Chunk(str(path), number, {key: batch.column(key).to_pylist() for key in columns}, read - done)
            number, done = number + len(batch), read


def texts(chunk: Chunk, keys: Sequence[str], problems: Problems) -> list[tuple[str, tuple]]:
    """The documents of a chunk.

    Args:
        problems: gets file and line of each that is none.

    Returns:
        For each document where it is, as ``file:line``, and for each key its text, or a list of sentences.
    """
    if isinstance(chunk.content, dict):
        rows = zip(*(chunk.content[key] for key in keys), strict=True)
        found = [(f"{chunk.origin}: row {number}", row) for number, row in enumerate(rows, chunk.first)]
    elif chunk.origin.endswith(".txt"):
        try:
            found = [(chunk.origin, (chunk.content.decode("utf-8"),) * len(keys))]
        except UnicodeDecodeError as error:
            problems.add(f"{chunk.origin}: not UTF-8 at byte {error.start}")
            return []
    else:
        found = [(place, row) for number, line in enumerate(chunk.content.split(b"\n"), chunk.first) if line.strip()
                 if (row := _parsed(place := f"{chunk.origin}:{number}", line, keys, problems))]
    good = []
    for place, row in found:
        wrong = [key for key, value in zip(keys, row, strict=True) if not _is_text(value)]
        for key in wrong:
            problems.add(f"{place}: {key} is no text")
        if not wrong:
            good.append((place, row))
    return good


def _parsed(place: str, line: bytes, keys: Sequence[str], problems: Problems) -> tuple | None:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        problems.add(f"{place}: not UTF-8 at byte {error.start} of the line")
        return None
    except json.JSONDecodeError as error:
        problems.add(f"{place}: no JSON: {error.msg} at column {error.colno}")
        return None
    if not isinstance(value, dict):
        problems.add(f"{place}: a line has to be a JSON object with the text under a key")
        return None
    missing = [key for key in keys if key not in value]
    for key in missing:
        problems.add(f"{place}: there is no key {key}{hint(key, value)}; --json-key names the one that has the text")
    return None if missing else tuple(value[key] for key in keys)


def _is_text(value: object) -> bool:
    return isinstance(value, str) or isinstance(value, list) and all(isinstance(part, str) for part in value)
