"""A rank on a GPU: ``gpu_rank.py RECORD FLAGS...`` trains with the flags and writes what each step returned."""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from megatron_hetermoe import pretrain_gpt  # noqa: E402


def main(argv: list[str]) -> int:
    record, *flags = argv
    from recording import record_steps

    record_steps(Path(f"{record}.{os.environ['RANK']}"))
    sys.argv = ["pretrain_gpt", *flags]
    return pretrain_gpt.main(flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
