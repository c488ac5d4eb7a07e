"""What parity cases share: the bound, and the files that they need."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

REL = 1e-5  # of loss and gradient norm, in fp32


def placement_file(parity, experts: int, layers: Mapping) -> str:
    """Writes a placement as a user does, and returns its path."""
    path = parity.folder / f"placement{len(list(parity.folder.glob('placement*')))}.yaml"
    path.write_text(yaml.safe_dump({"experts": experts, "layers": dict(layers)}))
    return str(path)
