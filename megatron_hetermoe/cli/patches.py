"""``hetermoe patches``: every change to Megatron at run time, and whether it fits the Megatron that is installed."""

from __future__ import annotations

import argparse
import dataclasses
import json


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "patches", help="list what is changed in Megatron at run time",
        description="Lists every patch with its reason, checks each against the installed Megatron's source, and "
        "exits with 1 if one does not fit. They apply, all or none, in a run with --hetermoe only; those of the arguments "
        "and of pretrain() when a script of Megatron-LM is run.")
    parser.add_argument("--json", action="store_true", help="as data")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from megatron_hetermoe.mcore.platform import cpu

    if cpu.needed():
        cpu.install()
    from megatron_hetermoe.mcore import patches

    rows = [
        {**dataclasses.asdict(patch), "problems": patches.unmet(patch)} for patch in patches.INVENTORY
    ]
    if args.json:
        print(json.dumps({"megatron": patches.imported_megatron(), "most": patches.MOST, "patches": rows}, indent=1))
    else:
        _print(rows, patches.imported_megatron(), patches.MOST)
    return int(any(row["problems"] for row in rows))


def _print(rows: list[dict], megatron: str, most: int) -> None:
    for row in rows:
        print(row["symbol"])
        print(f"    why          {row['reason']}")
        print(f"    can go when  {row['removable_when']}")
        print(f"    written for  {row['written_for']}; tested by {row['test']}")
        print(f"    fits         {'; '.join(row['problems']) or 'yes'}")
    print(f"{len(rows)} patches of at most {most}, checked against {megatron}")
