"""Documents through one of Megatron's tokenizers, by several processes, into indexed data sets.

What is written is byte for byte what Megatron-LM's tools/preprocess_data.py writes for the same documents, whatever the
number of processes.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import importlib.util
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.mcore.data import Totals, import_builder
from megatron_hetermoe.mcore.dataset_files import DatasetFiles
from megatron_hetermoe.mcore.documents import Chunk, chunks, texts

MOST_PROBLEMS = 20  # named in one message
_LIBRARIES = {"HuggingFaceTokenizer": "transformers", "GPT2BPETokenizer": "transformers", "TikTokenizer": "tiktoken",
              "SentencePieceTokenizer": "sentencepiece", "GPTSentencePieceTokenizer": "sentencepiece",
              "Llama2Tokenizer": "sentencepiece"}
_OF_A_FILE = ("TikTokenizer", "SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")


@dataclass(frozen=True)
class Job:
    """What every process has to know.

    Attributes:
        tokenizer: Megatron's arguments about its tokenizer.
        keys: whose texts become a data set each.
        append_eod: whether a document ends with the tokenizer's end of document.
    """

    tokenizer: argparse.Namespace
    keys: tuple[str, ...]
    append_eod: bool


def tokenizer_arguments(of_recipe: Sequence[str], flags: Sequence[str]) -> argparse.Namespace:
    """Megatron's arguments about its tokenizer.

    Args:
        of_recipe: flags of a recipe, of which only those about the tokenizer count.
        flags: the user's, which replace the recipe's; all have to be about the tokenizer.

    Raises:
        UsageError: with what is no flag of Megatron's tokenizers, and what the chosen tokenizer lacks.
    """
    from megatron.training.arguments import _add_tokenizer_args

    parser = _Parser(allow_abbrev=False, add_help=False)
    _add_tokenizer_args(parser)
    args, _ = parser.parse_known_args(list(of_recipe))
    args, unknown = parser.parse_known_args(list(flags), args)
    problems = Problems()
    if unknown:
        problems.add(f"these are no flags of Megatron's tokenizers: {' '.join(unknown)}")
    if not args.tokenizer_type:
        problems.add("which tokenizer? Give Megatron's --tokenizer-type after --, or a --recipe that has it")
    library = _LIBRARIES.get(args.tokenizer_type)
    if library and not importlib.util.find_spec(library):
        problems.add(f"--tokenizer-type {args.tokenizer_type} needs {library}: pip install {library}")
    if args.tokenizer_type == "NullTokenizer" and not args.vocab_size:
        problems.add("--tokenizer-type NullTokenizer needs --vocab-size")
    for name in ("tokenizer_model", "vocab_file", "merge_file"):
        path, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        is_file = name != "tokenizer_model" or args.tokenizer_type in _OF_A_FILE  # others may have a name on a hub
        if path and is_file and not Path(path).is_file():
            problems.add(f"{flag}: {path} is not there")
    if args.tokenizer_type in _OF_A_FILE and not args.tokenizer_model:
        problems.add(f"--tokenizer-type {args.tokenizer_type} needs --tokenizer-model")
    problems.raise_if_any()
    args.rank = 1  # the rank that logs is 0
    args.pad_vocab_size = False
    return args


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UsageError([f"Megatron does not accept these flags: {message}"])


def build(args: argparse.Namespace):
    """Megatron's tokenizer.

    Raises:
        UsageError: with what it or its library says, if it cannot be made.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are the parallelism
    try:
        return build_tokenizer(args)
    except Exception as error:  # each library has errors of its own
        said = " ".join(str(error).split()) or type(error).__name__
        raise UsageError([f"--tokenizer-type {args.tokenizer_type} cannot be used: {said[:600]}"]) from None


def write(job: Job, files: Sequence[Path], prefixes: Sequence[str], workers: int,
          advance: Callable[[int], None] = lambda size: None) -> Totals:
    """Tokenises files into one data set for each key. None appears before all are complete.

    Args:
        files: in the order in which their documents are written.
        prefixes: of the data sets, as ``job.keys``.
        workers: processes; with one, this process does it.
        advance: called with the bytes of files that are done.

    Raises:
        UsageError: with file and line of what cannot be tokenised, up to MOST_PROBLEMS; nothing is written then.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(build(job.tokenizer).vocab_size)
    staged, documents, tokens, size = [], 0, 0, 0
    problems = Problems()
    try:
        staged = [DatasetFiles(prefix) for prefix in prefixes]
        builders = [IndexedDatasetBuilder(str(one.bin), dtype=dtype) for one in staged]
        with _results(job, files, workers) as results:
            for chunk_bytes, encoded, wrong in results:
                with problems.taking():
                    wrong.raise_if_any()
                if len(problems) >= MOST_PROBLEMS:
                    problems.add("there may be more: these are the first ones")
                    break
                for row in encoded if not problems else ():
                    for builder, (ids, lengths) in zip(builders, row, strict=True):
                        builder.add_document(ids, lengths)
                        tokens += len(ids)
                documents += len(encoded)
                size += chunk_bytes
                advance(chunk_bytes)
        if not documents and not problems:
            problems.add("there is no document in these files")
        problems.raise_if_any()
        for builder, one in zip(builders, staged, strict=True):
            builder.finalize(str(one.idx))
            one.sync()
        for one in staged:
            one.publish()
    except OSError as error:
        raise UsageError([f"cannot write {prefixes[0]}: {error.strerror} ({error.filename})"]) from None
    finally:
        for one in staged:
            one.discard()
    return Totals(documents, tokens, size)


@contextlib.contextmanager
def _results(job: Job, files: Sequence[Path], workers: int) -> Iterator[Iterator[tuple[int, list, Problems]]]:
    """What ``_encode`` makes of each chunk, in the order of the files."""
    work = (chunk for path in files for chunk in chunks(path, job.keys))
    if workers == 1:
        _start(job)
        yield map(_encode, work)
        return
    # Not forks of this process, in which libraries have threads.
    context = multiprocessing.get_context("forkserver")
    others = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (job,))
    try:
        yield _in_order(pool, work, 4 * workers)
    except BaseException:
        # Their chunks are of no use any more, and one that is starting would first import its libraries.
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: concurrent.futures.Executor, work: Iterator[Chunk], ahead: int) -> Iterator:
    waiting: collections.deque = collections.deque()
    for chunk in work:
        waiting.append(pool.submit(_encode, chunk))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _start(job: Job) -> None:
    _encode.job, _encode.tokenizer = job, build(job.tokenizer)


def _start_worker(job: Job) -> None:
    """Ctrl-C is for the process that writes; when that one is gone, its workers go."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    import_builder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _start(job)


def _encode(chunk: Chunk) -> tuple[int, list, Problems]:
    """A chunk's bytes; for each document and key its tokens and the lengths of its parts; and what is wrong."""
    job, tokenizer = _encode.job, _encode.tokenizer
    problems = Problems()
    rows = []
    for place, values in texts(chunk, job.keys, problems):
        try:
            rows.append([_tokens(tokenizer, value, job.append_eod) for value in values])
        except (ValueError, KeyError, TypeError) as error:
            problems.add(f"{place}: cannot be tokenised: {' '.join(str(error).split())}")
    return chunk.bytes, [] if problems else rows, problems


def _tokens(tokenizer, value: str | list[str], append_eod: bool) -> tuple[list[int], list[int]]:
    """Tokens of a document, and how many each of its sentences has; as Megatron's own, an empty one gets no end."""
    parts = [ids for part in ([value] if isinstance(value, str) else value) if (ids := tokenizer.tokenize(part))]
    ids, lengths = [one for part in parts for one in part], list(map(len, parts))
    if ids and append_eod:
        ids.append(tokenizer.eod)
        lengths[-1] += 1
    if ids and not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
        raise ValueError(f"a token is not in the vocabulary of {tokenizer.vocab_size}")
    return ids, lengths
