"""Ranks with a stand-in for transformer-engine, which must be there before Megatron is imported: so a fork server of their own.

Run as a program it takes the arguments of ``ranks.run_ranks`` from its standard input, pickled, one run after the other, and
writes what came of each to its standard output.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ranks import Run, run_ranks

TESTS = Path(__file__).parent


class EngineServer:
    """Starts ranks of which only some have what stands for transformer-engine.

    Args:
        folder: where they run.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        path = os.pathsep.join(map(str, (TESTS / "stand_ins", TESTS, TESTS.parent)))
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         env={**os.environ, "PYTHONPATH": path})

    def run(self, argv: Sequence[str], world: int, engine: Sequence[int]) -> Run:
        """Trains as ``run_ranks``; the ranks ``engine`` have it. A failure is the caller's to look at."""
        env = {"HETERMOE_TEST_ENGINE_RANKS": ",".join(map(str, engine))}
        pickle.dump((list(argv), world, self.folder, env), self._process.stdin)
        self._process.stdin.flush()
        result = pickle.load(self._process.stdout)
        if isinstance(result, Exception):
            raise result
        return result

    def end(self) -> None:
        """Ends the server, and with it all that it has started."""
        self._process.stdin.close()
        self._process.wait()


def _answer(argv: Sequence[str], world: int, folder: Path, env: dict[str, str]) -> Any:
    try:
        return run_ranks(argv, world, cwd=folder, env=env)
    except AssertionError as error:  # a hang
        return error


if __name__ == "__main__":
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is written is no result
    while sys.stdin.buffer.peek(1):
        pickle.dump(_answer(*pickle.load(sys.stdin.buffer)), results)
        results.flush()
