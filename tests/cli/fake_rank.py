"""A rank for tests of the launcher: does what its arguments say, without torch."""

import os
import subprocess
import sys
import time
from pathlib import Path

from megatron_hetermoe.config.errors import UsageError, tell


def main(argv):
    """``fail RANK CODE FOLDER``: that rank ends with the code when all are there, as files in the folder say, and the others
    sleep; ``refuse RANK``: that rank finds its input wrong; ``env``; ``child``: sleeps with a child."""
    rank = int(os.environ["RANK"])
    print(f"rank {rank} of {os.environ['WORLD_SIZE']} pid {os.getpid()} {argv}")
    if argv[0] == "env":
        print({name: os.environ.get(name) for name in ("LOCAL_RANK", "MASTER_PORT", "OMP_NUM_THREADS", "EXTRA")})
        return 0
    if argv[0] == "fail":
        folder = Path(argv[3])
        (folder / f"here.{rank}").touch()
        if rank == int(argv[1]):
            while len(list(folder.glob("here.*"))) < int(os.environ["WORLD_SIZE"]):
                time.sleep(0.05)
            print("this is the reason", file=sys.stderr)
            return int(argv[2])
    if argv[0] == "refuse" and rank == int(argv[1]):
        return tell(UsageError(["this is refused"]))
    if argv[0] == "child":
        print("child", subprocess.Popen(["sleep", "60"]).pid)
    time.sleep(60)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
