"""A training script of Megatron-LM's, run unmodified, or with two lines at its top.

``python -m megatron_hetermoe.script SCRIPT.py FLAGS`` runs a script that knows nothing of ``--hetermoe``, on one rank, under
any launcher. A script that starts with

    import megatron_hetermoe.script
    megatron_hetermoe.script.activate()

needs no such command: ``torchrun SCRIPT.py FLAGS`` will do. Without ``--hetermoe`` both are plain Megatron.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_hetermoe.config.errors import Problems, UsageError, tell
from megatron_hetermoe.pretrain_gpt import leave, prepared

_LINES = "import megatron_hetermoe.script", "megatron_hetermoe.script.activate()"

_active = False  # a process runs one script


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a script as if it were started itself.

    Args:
        argv: the script's path and its flags; those of the command line when None.

    Returns:
        the exit code.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if not argv or not Path(argv[0]).is_file():
            raise UsageError([f"there is no script {argv[0] if argv else 'named'}: "
                              "python -m megatron_hetermoe.script SCRIPT.py FLAGS"])
        sys.argv = argv
        # Python puts a script's folder there, and in a checkout of Megatron-LM that is where its megatron is.
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))
        run = _activate()
        runpy.run_path(argv[0], run_name="__main__")
        if run is not None and not run.trained:
            raise UsageError([f"{argv[0]} has ended without calling megatron.training.pretrain: nothing was trained"])
    except UsageError as error:
        return tell(error)
    leave()
    return 0


def activate() -> None:
    """Has the script that calls this train as its ``--hetermoe`` flags say. It comes before the script imports torch or
    Megatron."""
    if _active:  # by main()
        return
    try:
        if "megatron.training" in sys.modules:
            raise UsageError([f"{sys.argv[0]} has imported Megatron before it called activate(): move the two lines up, "
                              f"above all other imports: {'; '.join(_LINES)}"])
        _activate()
    except UsageError as error:
        sys.exit(tell(error))


def _activate() -> Any:
    """Makes what Megatron offers a script this package's. Returns the ScriptRun, or None without ``--hetermoe``."""
    global _active
    _active = True
    problems = Problems()
    flags, rest = prepared(sys.argv[1:], problems)
    sys.argv = [sys.argv[0], *rest]
    from megatron_hetermoe.mcore import patches
    from megatron_hetermoe.mcore.platform.checkout import check_dataset_helpers, which_megatron

    if os.environ.get("RANK", "0") == "0":
        print(f"hetermoe: {sys.argv[0]} runs with {which_megatron()}", flush=True)
    check_dataset_helpers()
    if not flags.enabled:
        return None
    patches.check(patches.INVENTORY)  # before what follows is imported, which needs a Megatron that fits
    from megatron_hetermoe.mcore.script import ScriptRun

    run = ScriptRun(flags, problems)
    run.install()
    return run


if __name__ == "__main__":
    sys.exit(main())
