"""The console command ``hetermoe``: sub-commands, and what happens when the user's input cannot be run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_hetermoe import __version__
from megatron_hetermoe.cli import (
    convert, data, doctor, elastic, patches, plan, profile, rank, simulate, submit, trace, train,
)
from megatron_hetermoe.config.errors import EXIT_CODE, UsageError

# Each has add_parser(subparsers), which sets `run`, a function from the parsed arguments to an exit code. None may
# import torch or Megatron before it runs: that takes seconds, and `--help` must not wait for it.
COMMANDS = (train, elastic, plan, profile, simulate, data, convert, trace, patches, submit, rank, doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the words after ``hetermoe``; those of the process if None. What follows ``--`` is not parsed here
            but handed to the command as ``overrides``.

    Returns:
        The exit code: 2 if the input cannot be run, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        prog="hetermoe", description="Train mixture-of-experts models with attention and experts on different ranks.",
        epilog="hetermoe COMMAND --help says more. Where to begin: docs/start.md; what a message means: docs/trouble.md.")
    parser.add_argument("--version", action="version", version=f"hetermoe {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    args = parser.parse_args(words[:cut])
    args.overrides = words[cut + 1:]
    try:
        return args.run(args)
    except UsageError as error:
        print(error.message(), file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        return 130
