"""Puts this folder on the path of tests and ranks, so that tests import ``ranks`` and ``models`` by name."""

import sys
from pathlib import Path

TESTS = str(Path(__file__).parent)
if TESTS not in sys.path:
    sys.path.insert(0, TESTS)
