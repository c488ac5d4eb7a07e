"""``hetermoe data``: text in Megatron's indexed format, as bytes or by one of Megatron's tokenizers."""

from __future__ import annotations

import argparse
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from megatron_hetermoe.cli.activity import progress_bar
from megatron_hetermoe.cli.interrupt import interruptible
from megatron_hetermoe.cli.quiet import quiet
from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.recipe import load_recipe


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "data", help="turn text, JSON lines, Parquet or Arrow files into data sets (.bin/.idx)",
        usage="hetermoe data --out PREFIX [options] FILE_OR_FOLDER ... [-- Megatron's tokenizer flags]",
        description="Writes PREFIX.bin and PREFIX.idx. Without a tokenizer: one document a file, one token a byte, to be "
                    "trained with --data-path PREFIX --tokenizer-type NullTokenizer --vocab-size 257. With Megatron's "
                    "flags after --, or a recipe that has them: the documents of .txt, .jsonl (also .gz), .parquet and "
                    ".arrow files, as Megatron-LM's preprocess_data.py writes them.")
    parser.add_argument("--out", required=True, metavar="PREFIX", help="path of the data set, without .bin and .idx")
    parser.add_argument("--stdlib", action="store_true", help="the sources of this Python's standard library, as bytes")
    parser.add_argument("--glob", metavar="PATTERN", help="files to take from folders, as '*.py' (default: all)")
    parser.add_argument("--force", "--overwrite", action="store_true", help="write it anew if it is there")
    parser.add_argument("--recipe", metavar="RECIPE.yaml", help="whose tokenizer to take")
    parser.add_argument("--json-key", "--json-keys", "--column", nargs="+", metavar="KEY", dest="keys",
                        help="that has the text (default: text); several make a data set each, PREFIX_KEY_document")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the tokenizer's end of document")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that tokenise (default: one a core)")
    parser.add_argument("paths", nargs="*", metavar="FILE_OR_FOLDER")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    with interruptible():
        if args.recipe or args.overrides:
            return _tokenise(args)
        if args.keys or args.append_eod or args.workers is not None:
            raise UsageError(["--json-key, --append-eod and --workers are for a tokenizer: give Megatron's --tokenizer-type "
                              "after --, or a --recipe"])
        return _take_bytes(args)


def _tokenise(args: argparse.Namespace) -> int:
    from megatron_hetermoe.mcore import data, documents

    keys = tuple(dict.fromkeys(args.keys or ["text"]))
    prefixes = [args.out] if len(keys) == 1 else [f"{args.out}_{key}_document" for key in keys]
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    problems = Problems()
    if workers < 1:
        problems.add("--workers must be a whole number from 1 on")
    if args.stdlib:
        problems.add("--stdlib is for bytes, without a tokenizer: give files and folders to tokenise")
    elif not args.paths:
        problems.add("give files and folders to tokenise, before --json-key, which takes all names that follow it")
    for path in (Path(f"{prefix}{end}") for prefix in prefixes for end in (".bin", ".idx")):
        if path.exists() and not args.force:
            problems.add(f"{path} is there already; --overwrite writes it anew")
    files: list[Path] = []
    with problems.taking():
        files = [] if not args.paths else documents.files_of(data.sources(args.paths, args.glob or "*"), args.paths, keys)
    print("importing Megatron ...", flush=True)
    with quiet():
        from megatron_hetermoe.mcore import tokenized

        with problems.taking():
            given = load_recipe(args.recipe, os.environ).argv if args.recipe else []
            tokenizer = tokenized.tokenizer_arguments(given, args.overrides)
            tokenized.build(tokenizer)
    problems.raise_if_any()
    with progress_bar() as begin, quiet():
        totals = tokenized.write(tokenized.Job(tokenizer, keys, args.append_eod), files, prefixes, workers,
                                 begin("tokenising", _size(files)))
    print(f"wrote {', '.join(prefixes)} (.bin and .idx): {totals.documents:,} documents, {totals.tokens:,} tokens, "
          f"{totals.bytes:,} bytes read")
    return 0


def _take_bytes(args: argparse.Namespace) -> int:
    from megatron_hetermoe.mcore import data

    if args.stdlib == bool(args.paths):
        raise UsageError(["give either --stdlib or files and folders to take"])
    if args.stdlib and args.glob:
        raise UsageError(["--glob chooses among files in folders; --stdlib takes none"])
    tokens = data.existing(args.out)
    if tokens is not None and not args.force:
        print(f"{args.out}.bin and .idx are there already, with {tokens:,} tokens; --force writes them anew")
        return 0
    if args.stdlib:
        files = data.stdlib_sources()
        print(f"taking {len(files)} .py files from {sysconfig.get_path('stdlib')}, without tests and site-packages")
    else:
        files = data.sources(args.paths, args.glob or "*")
    print("importing Megatron ...", flush=True)
    with progress_bar() as begin:
        totals = data.write_dataset(files, args.out, begin("tokenising", _size(files)))
    print(f"wrote {args.out}.bin and .idx: {totals.documents:,} documents, {totals.tokens:,} tokens, "
          f"{totals.bytes:,} bytes of text")
    return 0


def _size(files: Sequence[Path]) -> int:
    """Bytes of files."""
    return sum(path.stat().st_size for path in files)
