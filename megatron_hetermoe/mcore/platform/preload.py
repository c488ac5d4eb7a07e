"""Imported by the process that ranks are forked from: what every rank would import, once for all.

Importing has an effect here on purpose: ``multiprocessing`` preloads modules by name, nothing else. No import below
may start a thread, because a forked process has only the thread that forked it.
"""

import importlib.util
import warnings

from megatron_hetermoe.mcore.platform import cpu

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Megatron has to say about missing GPU libraries
    if cpu.needed():
        cpu.install()  # before Megatron, which looks up at its import what this maps

    # What a run would import late, at a second or more a rank: torch's optimizers want the compiler.
    import megatron.core.models.mimo
    import megatron.core.tokenizers.text
    import megatron.training.training
    import torch._dynamo

    from megatron_hetermoe.mcore import patches

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp"):  # a checkout compiles it in its first run
        import megatron.core.datasets.helpers
    if not any(map(patches.unmet, patches.RUN)):  # else a rank says what does not fit
        import megatron_hetermoe.mcore.gpt
        import megatron_hetermoe.mcore.pretrain  # noqa: F401
