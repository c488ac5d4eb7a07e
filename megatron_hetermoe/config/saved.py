"""The plan that a checkpoint was saved under lies beside its tensors; a run with other ranks starts from it."""

from __future__ import annotations

from pathlib import Path

from megatron_hetermoe.config.errors import UsageError
from megatron_hetermoe.config.plan import Plan, plan_from_json

TRACKER = "latest_checkpointed_iteration.txt"  # Megatron's
PLAN = "hetermoe-plan.json"  # in a checkpoint's own folder


def iteration_folder(folder: Path, iteration: int) -> Path:
    """Where Megatron puts the checkpoint of an iteration."""
    return folder / f"iter_{iteration:07d}"


def saved_plan(folder: str, step: int | None = None) -> Plan:
    """The plan of a checkpoint.

    Args:
        folder: Megatron's ``--load`` or ``--save``.
        step: Megatron's ``--ckpt-step``; the last checkpoint's if None.

    Raises:
        UsageError: where there is no checkpoint, or none that a disaggregated run saved.
    """
    if step is None:
        try:
            said = Path(folder, TRACKER).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            raise UsageError([f"no checkpoint is in {folder}: start without one, or give --plan FILE"]) from None
        if not said.isdecimal() or len(said) > 12:
            raise UsageError([f"{Path(folder, TRACKER)} names no iteration: give --plan FILE, or -- --ckpt-step N"])
        step = int(said)
    path = iteration_folder(Path(folder), step) / PLAN
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise UsageError([f"{path} cannot be read, so what layout the checkpoint is of is not known: give --plan FILE"]
                         ) from None
    return plan_from_json(text, str(path))
