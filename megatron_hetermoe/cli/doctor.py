"""``hetermoe doctor``: whether training would work here, alone or with all ranks of a launcher."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hetermoe.cli.rank import take_place
from megatron_hetermoe.config.errors import UsageError, tell

if TYPE_CHECKING:
    import torch.distributed as dist

    from megatron_hetermoe.planner.diagnosis import Finding, Machine, Transfer

TIMEOUT = 120  # seconds for ranks to come
_MARKS = {"error": "[red]error[/red]", "warning": "[yellow]warning[/yellow]", "good": "[green]good[/green]"}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "doctor", help="find what would keep training from working, and what to do", usage="hetermoe doctor [options]",
        description="Looks at Python, packages, GPU and NCCL of this machine. Under srun or torchrun it looks at all "
        "ranks and at what lies between them, as `torchrun ... -m megatron_hetermoe doctor`, and rank 0 prints. Exits with 1 "
        "when training would fail.")
    parser.add_argument("--json", action="store_true", help="as data: machines, transfers, findings")
    parser.add_argument("--shared-dir", metavar="DIR", help="see whether all ranks share this folder, that of --save")
    parser.add_argument("--timeout", type=int, default=TIMEOUT, metavar="SECONDS",
                        help=f"how long to wait for ranks (default {TIMEOUT})")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from megatron_hetermoe.planner.diagnosis import ERROR, diagnose

    machines, transfers, failures = [], [], {}
    try:
        if args.timeout < 1:
            raise UsageError([f"--timeout is {args.timeout}; it must be 1 or more seconds"])
        if not _under_launcher(os.environ):
            machines = [_alone(args)]
        else:
            take_place(os.environ)
            machines, transfers, failures = _all_ranks(args)
    except UsageError as error:
        return tell(error)
    findings = diagnose(machines, transfers, failures)
    if os.environ.get("RANK", "0") == "0":
        if args.json:
            facts = {"machines": machines, "transfers": transfers, "findings": findings}
            print(json.dumps({name: [asdict(one) for one in found] for name, found in facts.items()}, indent=1))
        else:
            _print(machines, findings)
    return int(any(finding.level == ERROR for finding in findings))


def _under_launcher(environ: Mapping[str, str]) -> bool:
    """Whether other ranks are started beside this one. Slurm sets most of its variables in a batch script too."""
    return "RANK" in environ or int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 or (
        {"SLURM_PROCID", "MASTER_ADDR"} <= environ.keys())


def _alone(args: argparse.Namespace) -> Machine:
    from megatron_hetermoe.runtime.machine import this_machine, write_probe

    if args.shared_dir:
        _written(args.shared_dir, write_probe).unlink()
    return this_machine(0, 0, None)


def _all_ranks(args: argparse.Namespace) -> tuple[list[Machine], list[Transfer], dict[int, str]]:
    """What all ranks see, the transfers between them, and by rank why it measured none. All ranks come to the same."""
    from megatron_hetermoe.planner.diagnosis import Transfer, machine_from_document, machine_to_document
    from megatron_hetermoe.runtime.machine import this_machine, write_probe
    from megatron_hetermoe.runtime.roll_call import open_store, roll_call
    from megatron_hetermoe.runtime.watched import attempt

    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = timedelta(seconds=args.timeout)

    def told(topic: str, document: Any) -> list[Any]:
        own = dist.PrefixStore(f"{attempt()}/doctor/{topic}", store)
        return [json.loads(said) for said in roll_call(own, rank, world, is_host, json.dumps(document))]

    store, is_host = open_store(rank, world, timeout)
    probe = _written(args.shared_dir, write_probe) if args.shared_dir and rank == 0 else None
    try:
        name = told("probe", probe and probe.name)[0]
        sees_file = Path(args.shared_dir, name).is_file() if name else None
        here = this_machine(rank, int(os.environ["LOCAL_RANK"]), sees_file)
        machines = [machine_from_document(one) for one in told("machines", machine_to_document(here))]
    finally:
        if probe:
            probe.unlink()
    received, failure = _measured(rank, world, dist.PrefixStore(attempt(), store), timeout, machines)
    answers = told("transfers", {"received": [asdict(one) for one in received], "failure": failure})
    transfers = [Transfer(**one) for answer in answers for one in answer["received"]]
    return machines, transfers, {index: answer["failure"] for index, answer in enumerate(answers) if answer["failure"]}


def _written(folder: str, write_probe: Any) -> Path:
    try:
        return write_probe(Path(folder))
    except OSError as error:
        raise UsageError([f"--shared-dir {folder}: cannot write there: {error.strerror}"]) from None


def _measured(rank: int, world: int, store: dist.Store, timeout: timedelta,
              machines: Sequence[Machine]) -> tuple[list[Transfer], str]:
    """The transfers that this rank received, or why it could not. They go over NCCL where that would start, otherwise
    over gloo."""
    import torch.distributed as dist

    from megatron_hetermoe.planner.diagnosis import pairs_to_measure
    from megatron_hetermoe.runtime.machine import measure

    pairs = pairs_to_measure(machines)
    if not pairs:
        return [], ""
    boards = {one.gpu.uuid for one in machines if one.gpu}
    on_gpu = len(boards) == world and len({one.nccl for one in machines}) == 1
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.PrefixStore("doctor", store), rank=rank,
                                world_size=world, timeout=timeout)
        received = measure(rank, pairs, on_gpu)
        dist.barrier()
    except (RuntimeError, ValueError) as error:
        return [], " ".join(str(error).split())[:300]
    dist.destroy_process_group()
    return received, ""


def _print(machines: Sequence[Machine], findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    from megatron_hetermoe.planner.diagnosis import ranks_in_words

    console = Console()
    nodes = len({one.node for one in machines})
    console.print(f"{len(machines)} rank{'s' * (len(machines) > 1)} on {nodes} machine{'s' * (nodes > 1)}",
                  highlight=False)
    table = Table("", "what", "how it is", "what to do")
    for finding in findings:
        everywhere = not finding.where or len(finding.where) == len(machines)
        where = "" if everywhere else f" ({ranks_in_words(finding.where)})"
        what = f"{finding.what}{where}".replace("[", r"\[")
        table.add_row(_MARKS[finding.level], finding.subject, what, finding.remedy)
    console.print(table)
