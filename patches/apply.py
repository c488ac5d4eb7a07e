#!/usr/bin/env python3
"""Adds two lines to a checkout's pretrain_gpt.py, so that ``torchrun pretrain_gpt.py --hetermoe ...`` works in it.

    patches/apply.py MEGATRON_LM              adds them
    patches/apply.py MEGATRON_LM --check      says whether they are there; exit code 1 if not
    patches/apply.py MEGATRON_LM --reverse    takes them out

It changes no file that is not listed below. For any other it prints the lines, to be added by hand (exit code 2).
Needs Python 3.9 and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
FILE = "pretrain_gpt.py"
CANNOT = 2  # exit code


@dataclass(frozen=True)
class Release:
    """A release whose pretrain_gpt.py is known.

    Attributes:
        name: the release.
        patch: file in this folder.
        before, after: SHA-256 of FILE without and with the patch.
    """

    name: str
    patch: str
    before: str
    after: str


RELEASES = (
    Release(
        "core_v0.18.0 and core_v0.18.2", "core_v0.18.patch",
        "c80438d4bf7c842ff6ebe06c1f9d796045f350add57adc015eda6be2016e6036",
        "6ad87f6b83ab6dc327200388fcf2cde12498cf6f5c56fbf6af73616b162786e3",
    ),
    Release(
        "core_v0.19.0", "core_v0.19.patch",
        "7283c4aeb5a00c694bbf2930527a184fc0d5f607f548c74707c71cc240d05fae",
        "d671f44bb0efd0784121335291b04dd74e1e26b3c48a8b82b0f69652428a4b91",
    ),
    Release(
        "main of August 2026 (fad6111ee to d98e8a64d)", "main.patch",
        "9df1964ebcb88d16a1a42a5aa3463a617f6843dc16ba8882e575bab92ae97855",
        "348a734b2277477d816783b8afb242836c23b1d4cc327e27bd89321e413aa678",
    ),
)


def added(patch: str) -> tuple[int, list[str]]:
    """The line of a file after which a patch inserts, from 0 for its start, and what it inserts.

    Args:
        patch: a unified diff of one insertion without context, so that it holds no line of the file's.
    """
    (hunk,) = re.findall(r"^@@ -(\d+),0 \+\d+,\d+ @@$", patch, re.MULTILINE)
    lines = [line[1:] for line in patch.splitlines(keepends=True) if line.startswith("+") and line[:3] != "+++"]
    return int(hunk), lines


def with_lines(text: str, patch: str) -> str:
    """A file's text with the patch."""
    number, lines = added(patch)
    before = text.splitlines(keepends=True)
    return "".join([*before[:number], *lines, *before[number:]])


def without_lines(text: str, patch: str) -> str:
    """The reverse of ``with_lines``."""
    number, lines = added(patch)
    patched = text.splitlines(keepends=True)
    assert patched[number:number + len(lines)] == lines
    return "".join([*patched[:number], *patched[number + len(lines):]])


def main(argv: list[str] | None = None, releases: tuple[Release, ...] = RELEASES) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, metavar="MEGATRON_LM", help="folder of a checkout of Megatron-LM")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--check", action="store_true")
    choice.add_argument("--reverse", action="store_true")
    args = parser.parse_args(argv)
    file = args.checkout / FILE
    try:
        content = file.read_bytes()
    except OSError as error:
        print(f"cannot read {file}: {error.strerror}; give the folder of a checkout of Megatron-LM", file=sys.stderr)
        return CANNOT
    digest = hashlib.sha256(content).hexdigest()
    for release in releases:
        if digest in (release.before, release.after):
            return _known(file, release, digest == release.after, args)
    return _unknown(file, content.decode("utf-8", "replace"), digest, args)


def _known(file: Path, release: Release, is_patched: bool, args: argparse.Namespace) -> int:
    if args.check:
        print(f"{file} is that of {release.name}, {'with' if is_patched else 'without'} the two lines")
        return 0 if is_patched else 1
    if is_patched is not args.reverse:
        print(f"{file} is that of {release.name}, {'with' if is_patched else 'without'} the two lines already")
        return 0
    patch = (FOLDER / release.patch).read_text(encoding="utf-8")
    change, wanted = (without_lines, release.before) if args.reverse else (with_lines, release.after)
    result = change(file.read_bytes().decode("utf-8"), patch).encode("utf-8")
    assert hashlib.sha256(result).hexdigest() == wanted, f"{release.patch} does not give the file that is listed"
    file.write_bytes(result)
    print(f"{file} is that of {release.name}: {'took out' if args.reverse else 'added'} the two lines of {release.patch}")
    return 0


def _unknown(file: Path, text: str, digest: str, args: argparse.Namespace) -> int:
    _, lines = added((FOLDER / RELEASES[-1].patch).read_text(encoding="utf-8"))
    if "".join(lines) in text:
        print(f"{file} is of no release that is known here, and has the two lines; "
              + ("take them out by hand" if args.reverse else "nothing to do"))
        return CANNOT if args.reverse else 0
    print(f"{file} is of no release that is known here (SHA-256 {digest}), and was left as it is.\n"
          "Add these two lines above its first import of torch or Megatron:\n\n" + "".join(lines), file=sys.stderr)
    return CANNOT


if __name__ == "__main__":
    sys.exit(main())
