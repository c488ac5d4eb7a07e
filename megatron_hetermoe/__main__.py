"""``python -m megatron_hetermoe``: the same as the console command ``hetermoe``."""

import sys

from megatron_hetermoe.cli.main import main

sys.exit(main())
