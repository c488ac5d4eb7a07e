"""Imported by the process that ranks are forked from: what every rank would import, once for all.

Importing has an effect here on purpose: ``multiprocessing`` preloads modules by name, nothing else.
"""

from megatron_hetermoe.mcore.platform import cpu

if cpu.needed():
    cpu.install()

import megatron.training  # noqa: E402,F401  after the platform, which maps what Megatron looks up while it is imported
