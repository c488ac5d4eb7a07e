"""``host_rank.py FILE RANK`` becomes the rank that ``hosts.py`` has described in a file, on whichever host it is started."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    of_rank = json.loads(Path(sys.argv[1]).read_text())[int(sys.argv[2])]
    os.environ.update(of_rank["environment"])
    os.execv(sys.executable, [sys.executable, *of_rank["words"]])
