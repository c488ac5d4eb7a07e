"""Puts this folder on the path of tests and ranks, so that tests import ``ranks`` and ``models`` by name."""

import sys
from pathlib import Path

from hypothesis import settings

TESTS = str(Path(__file__).parent)
if TESTS not in sys.path:
    sys.path.insert(0, TESTS)

# A deadline for one example measures the machine's load, not the code.
settings.register_profile("loaded", deadline=None)
settings.load_profile("loaded")
