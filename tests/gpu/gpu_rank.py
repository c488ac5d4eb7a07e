"""A rank on a GPU: ``gpu_rank.py RECORD FLAGS...`` trains with the flags and writes what each step returned."""

import faulthandler
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]


class WithoutEngine:
    """A finder of modules that does not find transformer-engine, which is installed."""

    def __init__(self, finder: object):
        self._finder = finder

    def __getattr__(self, name: str) -> object:
        return getattr(self._finder, name)

    def find_spec(self, fullname: str, path=None, target=None):
        """As any finder's."""
        hidden = fullname.partition(".")[0].startswith("transformer_engine")
        return None if hidden else self._finder.find_spec(fullname, path, target)


if os.environ["RANK"] in os.environ.get("GPU_RANKS_WITHOUT_ENGINE", "").split(","):
    sys.meta_path[:] = map(WithoutEngine, sys.meta_path)

from megatron_hetermoe import pretrain_gpt  # noqa: E402


LIMIT = int(os.environ.get("GPU_RANK_SECONDS", "240"))


def main(argv: list[str]) -> int:
    record, *flags = argv
    from recording import record_steps

    # A hang ends with the stacks of all threads in the log.
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    record_steps(Path(f"{record}.{os.environ['RANK']}"))
    sys.argv = ["pretrain_gpt", *flags]
    return pretrain_gpt.main(flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
