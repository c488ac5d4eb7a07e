"""Megatron's flags that divide layers into a plan's pipeline stages."""

from __future__ import annotations

from collections.abc import Sequence

SIZE = "--pipeline-model-parallel-size"
FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
VIRTUAL, LAYOUT = "--num-virtual-stages-per-pipeline-rank", "--pipeline-model-parallel-layout"
# All that have a say in it.
STAGE_FLAGS = (SIZE, FIRST, LAST, VIRTUAL, "--num-layers-per-virtual-pipeline-stage", LAYOUT,
               "--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split")


def stage_flags(stage_layers: Sequence[int], virtual_stages: int, mtp_layers: int) -> list[str]:
    """The flags of a plan's stages: how many there are, and what makes them uneven or gives each several parts, by a layout
    where nothing shorter says it. In place of all of STAGE_FLAGS.

    Args:
        stage_layers, virtual_stages: as in a plan.
        mtp_layers: as in a model's shape.
    """
    words = [SIZE, str(max(1, len(stage_layers) // virtual_stages))]
    layers = list(stage_layers)
    if not layers:
        return words
    layers[-1] -= mtp_layers  # which Megatron puts into the last part
    if len(set(layers)) == 1:
        return words if virtual_stages == 1 else [*words, VIRTUAL, str(virtual_stages)]
    if virtual_stages == 1 and len(set(layers[1:-1])) <= 1:
        # Those between the first and the last are alike; one flag is enough where the other end is like them too.
        middle = layers[1] if len(layers) > 2 else None
        words += [FIRST, str(layers[0])] if layers[0] != middle else []
        return words + ([LAST, str(layers[-1])] if layers[-1] != middle and middle is not None else [])
    parts = ["t" * count for count in layers]
    parts[0] = "E" + parts[0]
    parts[-1] += "m" * mtp_layers + "L"
    return [*words, LAYOUT, "|".join(parts)]
