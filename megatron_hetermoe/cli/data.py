"""``hetermoe data``: text files as bytes in Megatron's indexed format."""

from __future__ import annotations

import argparse
import sys
import sysconfig

from megatron_hetermoe.config.errors import UsageError


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "data", help="turn text files into a data set (.bin/.idx), tokenised by bytes",
        description="Writes PREFIX.bin and PREFIX.idx: one document a file, one token a byte. Train on it with "
                    "--data-path PREFIX --tokenizer-type NullTokenizer --vocab-size 257.")
    parser.add_argument("--out", required=True, metavar="PREFIX", help="path of the data set, without .bin and .idx")
    parser.add_argument("--stdlib", action="store_true", help="the sources of this Python's standard library")
    parser.add_argument("--glob", metavar="PATTERN", help="files to take from folders, as '*.py' (default: all)")
    parser.add_argument("--force", action="store_true", help="write it anew if it is there")
    parser.add_argument("paths", nargs="*", metavar="FILE_OR_FOLDER")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
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
    totals = _write(files, args.out)
    print(f"wrote {args.out}.bin and .idx: {totals.documents:,} documents, {totals.tokens:,} tokens, "
          f"{totals.bytes:,} bytes of text")
    return 0


def _write(files, prefix):
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from megatron_hetermoe.mcore import data

    size = sum(path.stat().st_size for path in files)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("tokenising", total=size)
        return data.write_dataset(files, prefix, lambda count: progress.advance(task, count))
