"""Which holder of a ZP group has which expert of which layer."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.config.shape import ModelShape
from megatron_hetermoe.topology.layout import Layout

EVERY_LAYER = "all"
_DIGITS = 12  # of an expert's or a layer's number; Python itself refuses to read thousands


@dataclass(frozen=True)
class Placement:
    """For each layer from 1 on, the holder of each of its experts (``Layout.holder_of``).

    Any map is valid: holders may have different numbers of experts, or none in a layer, and attention ranks may
    be holders. The result of the paper's asymmetric expert assignment (Asym-EA, section 4) is such a map.

    Attributes:
        holders: ``holders[layer - 1][expert]`` is a holder; empty for a layer without experts.
        members: holders of a ZP group: M + N, or fewer where several expert ranks are one holder.
    """

    holders: tuple[tuple[int, ...], ...]
    members: int

    def __post_init__(self) -> None:
        assert all(0 <= member < self.members for layer in self.holders for member in layer)

    def held(self, layer: int, member: int) -> tuple[int, ...]:
        """The experts of a layer that a member holds, ascending. Their order is that of its local experts."""
        return tuple(expert for expert, holder in enumerate(self.holders[layer - 1]) if holder == member)

    def holders_of(self, layer: int) -> tuple[int, ...]:
        """The members that hold at least one expert of a layer, ascending."""
        return tuple(sorted(set(self.holders[layer - 1])))

    def layers_of(self, member: int) -> frozenset[int]:
        """The layers in which a member holds at least one expert."""
        return frozenset(layer for layer, holders in enumerate(self.holders, start=1) if member in holders)

    def expert_order(self, layer: int) -> tuple[int, ...]:
        """The experts of a layer by holder, then by local index: the order of tokens in a dispatch."""
        return tuple(expert for member in self.holders_of(layer) for expert in self.held(layer, member))

    def of_layers(self, layers: range) -> Placement:
        """The placement of some layers next to each other, which are then its layers from 1 on."""
        return Placement(self.holders[layers.start - 1:layers.stop - 1], self.members)

    def of_chunks(self, chunks: Sequence[range]) -> Placement:
        """The placement of a stage's chunks as tasks number them: between two of them a number stands for no layer."""
        holders = [(*self.of_layers(layers).holders, ()) for layers in chunks]
        return Placement(sum(holders, ())[:-1], self.members)

    def experts_held(self, member: int) -> int:
        """How many (layer, expert) pairs a member holds."""
        return sum(layer.count(member) for layer in self.holders)


def even_placement(shape: ModelShape, layout: Layout) -> Placement:
    """Experts spread over the expert ranks in blocks, the first ones taking what does not divide."""
    base, extra = divmod(shape.experts, layout.holders - layout.m)
    layer = tuple(
        layout.m + holder for holder in range(layout.holders - layout.m) for _ in range(base + (holder < extra))
    )
    return Placement(
        tuple(layer if number in shape.moe_layers else () for number in range(1, shape.layers + 1)),
        layout.holders,
    )


def placement_from_document(document: Any, shape: ModelShape, layout: Layout, origin: str) -> Placement:
    """Reads a placement as a user writes it.

    The document has ``experts``, the model's number of them, and ``layers``, which gives for a layer's number,
    or for "all" layers that have no entry of their own, each holder's experts. Holders are called a0 to a{M-1}
    and from e0 on, each as many expert ranks as share their experts; experts are a list of numbers, or of ranges such as "4-7"::

        experts: 8
        layers:
          all: {e0: ["0-3"], e1: ["4-7"]}
          2:   {a0: [0], a1: [1], e0: ["2-4"], e1: ["5-7"]}

    Raises:
        UsageError: with every layer, holder and expert that does not fit.
    """
    problems = Problems()
    if not isinstance(document, Mapping) or not isinstance(document.get("layers"), Mapping):
        problems.add(f"{origin}: a placement has the keys 'experts' and 'layers', each a mapping as in the README")
        problems.raise_if_any()
    for key in document.keys() - {"experts", "layers"}:
        problems.add(f"{origin}: unknown key {key!r}; a placement has 'experts' and 'layers'")
    if document.get("experts") != shape.experts:
        problems.add(f"{origin} is for a model with {document.get('experts')} experts a layer, this one has "
                     f"{shape.experts}: write a placement for this model")
    entries = {_layer_number(key): entry for key, entry in document["layers"].items()}
    for key in entries:
        if key != EVERY_LAYER and key not in shape.moe_layers:
            what = "has no experts" if key in range(1, shape.layers + 1) else "does not exist"
            problems.add(f"{origin}: layer {key} {what} (layers with experts: {_ranges(shape.moe_layers)})")
    names = {f"a{i}": i for i in range(layout.m)} | {f"e{j}": layout.m + j for j in range(layout.holders - layout.m)}
    holders: list[tuple[int, ...]] = []
    for layer in range(1, shape.layers + 1):
        if layer not in shape.moe_layers:
            holders.append(())
        elif layer not in entries and EVERY_LAYER not in entries:
            problems.add(f"{origin}: layer {layer} has no entry; add one, or one for 'all'")
        else:
            entry = entries.get(layer, entries.get(EVERY_LAYER))
            holders.append(_layer_holders(entry, shape.experts, names, f"{origin}: layer {layer}", problems))
    problems.raise_if_any()
    return Placement(tuple(holders), layout.holders)


def _layer_number(key: Any) -> Any:
    number = _number(key) if isinstance(key, str) else None
    return key if number is None else number


def _layer_holders(
    entry: Any, experts: int, names: Mapping[str, int], where: str, problems: Problems
) -> tuple[int, ...]:
    """The holder of each expert of one layer; notes holders that do not exist and experts not held exactly once."""
    if not isinstance(entry, Mapping):
        problems.add(f"{where} is not a mapping from holders to experts")
        return ()
    holder_names: dict[int, list[str]] = {expert: [] for expert in range(experts)}
    for name, listed in entry.items():
        if name not in names:
            problems.add(f"{where}: no holder {name!r} in this layout; it has {', '.join(names)}")
            continue
        for expert in _experts(listed, experts, f"{where}, {name}", problems):
            if expert not in holder_names:
                problems.add(f"{where}, {name}: no expert {expert}; they are 0 to {experts - 1}")
            else:
                holder_names[expert].append(name)
    for expert, held_by in holder_names.items():
        if not held_by:
            problems.add(f"{where}: expert {expert} has no holder; give it to one")
        elif len(held_by) > 1:
            problems.add(f"{where}: expert {expert} has {len(held_by)} holders, {' and '.join(held_by)}; keep one")
    return tuple(names[held_by[0]] if held_by else 0 for held_by in holder_names.values())


def _experts(listed: Any, experts: int, where: str, problems: Problems) -> list[int]:
    """The numbers in a list of numbers and ranges; of those that are no expert's, the first of each item."""
    found: list[int] = []
    for item in listed if isinstance(listed, list) else [listed]:
        first, dash, last = (item if isinstance(item, str) else repr(item)).partition("-")
        start, end = _number(first), _number(last if dash else first)
        if start is None or end is None or start > end:
            problems.add(f"{where}: {reprlib.repr(item)} is neither an expert's number nor a range such as \"4-7\"")
        else:
            found.extend(range(start, max(start, min(end, experts)) + 1))
    return found


def _number(text: str) -> int | None:
    """A number from 0 on that is not out of all reason, or None."""
    text = text.strip()
    return int(text) if text.isdecimal() and len(text) <= _DIGITS else None


def _ranges(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers)) if len(numbers) < 9 else f"{numbers[0]} to {numbers[-1]}, {len(numbers)} of them"
