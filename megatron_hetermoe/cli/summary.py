"""What is said when a run has ended: the table of a good one, the reason of a failed one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_hetermoe.cli.progress import Watch
from megatron_hetermoe.config.errors import EXIT_CODE, PEER_LOST_CODE
from megatron_hetermoe.config.flags import PREFIX
from megatron_hetermoe.config.recipe import override

TAIL = 20  # lines of a failed rank's log

_OURS = re.compile(r"^hetermoe: \d+ problems?:$", re.MULTILINE)
_PEER = re.compile(r"hetermoe: (rank \d+|the launcher's store) ")
_ARGPARSE = re.compile(r"^\S+: error: ", re.MULTILINE)


def failure(text: str, code: int) -> str:
    """What to show of a failed rank's log.

    Args:
        text: the log.
        code: the rank's exit code. With that of a usage error the log has a message for the user, ours or that
            of Megatron's argument parser after its long usage: then it is that message alone. With that of a rank
            whose peer is gone it is what the rank says of that.
    """
    if code == EXIT_CODE:
        starts = [match.start() for pattern in (_OURS, _ARGPARSE) for match in pattern.finditer(text)]
        if starts:
            return text[starts[-1]:].rstrip()
    lines = text.rstrip().splitlines()
    if code == PEER_LOST_CODE and (said := [line for line in lines if _PEER.match(line)]):
        return "\n".join(said)
    return "\n".join(lines[-TAIL:])


def print_summary(console: Console, watch: Watch, command: Sequence[str], overrides: Sequence[str], logs: Path) -> None:
    """Prints what ran where, what came of it and what to try next.

    Args:
        console: where to.
        watch: has read all logs.
        command: the words that started the run, without ``--`` and what follows.
        overrides: what followed.
        logs: the folder with the logs.
    """
    facts = []
    if watch.plan:
        console.print(_ranks(watch.plan))
        wave = watch.plan.get("wave") or "all"
        facts.append(("schedule", f"{watch.plan.get('schedule')}, {wave} microbatches on the way"))
    if watch.first and watch.last and None not in (watch.first.loss, watch.last.loss):
        facts.append(("loss", f"{watch.first.loss:.3f} at step {watch.first.iteration}, "
                              f"{watch.last.loss:.3f} at step {watch.last.iteration}"))
    if watch.megatron:
        facts.append(("megatron", watch.megatron))
    facts.append(("checkpoint", watch.checkpoint[1] if watch.checkpoint else "none; `-- --save DIR` saves one"))
    facts.append(("logs", str(logs)))
    for number, extra in enumerate(_next(watch)):
        words = shlex.join([*command, "--", *override(overrides, extra)])
        facts.append(("" if number else "to try next", words))
    for title, text in facts:
        # plain lines, which a narrow terminal wraps without breaking a command that is copied from it
        console.print(f"{title:<13}{text}", highlight=False, markup=False, soft_wrap=True)


def _ranks(plan: dict) -> Table:
    table = Table("rank", "role", "ZP group", "holds")
    for entry in plan.get("ranks", ()):
        experts = f"{entry['experts']} experts, over all layers" if entry["experts"] else "no experts"
        holds = experts if entry["role"] == "expert" else f"all but experts; {experts}" if entry["experts"] else \
            "all but experts"
        table.add_row(str(entry["rank"]), entry["role"], str(entry["group"]), holds)
    return table


def _next(watch: Watch) -> list[list[str]]:
    """Flags to add to the same command."""
    flags = []
    if watch.checkpoint and watch.last:
        # the longer run's learning-rate schedule is not the checkpoint's, which Megatron wants confirmed
        flags.append(["--load", watch.checkpoint[1], "--train-iters", str(2 * watch.last.total),
                      "--override-opt-param-scheduler"])
    if watch.plan:
        other = "sequential" if watch.plan.get("schedule") != "sequential" else "zebra"
        flags.append([f"{PREFIX}-schedule", other])
    return flags
