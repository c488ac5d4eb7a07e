"""What each rank must hold: weights, gradients, optimizer state, activations of the microbatches on their way.

Where a profile has measured figures they replace the arithmetic here.
"""

from __future__ import annotations

from functools import cached_property
from math import sqrt
from typing import NamedTuple

from megatron_hetermoe.config.plan import MERGED, TOGETHER
from megatron_hetermoe.cost.group import BYTES, GRADIENT_BYTES, GroupCosts

MARGIN = 0.10  # share of a GPU's memory that a plan leaves free, for what nobody counted
OVERHEAD = 1.0e9  # bytes outside of torch's allocator: context, communicators of both channels and of the pool
# Bytes inside of it that no tensor here accounts for: what replaying the allocator left of ranks' measured memory, 0.5 to 0.7 GB
# most often; cuBLAS keeps 32 MiB for each stream that it multiplies on, and small tensors have blocks.
_WORKSPACES = 0.5e9
# Rows that an expert gets in a layer deviate from their mean by 0.5 to 0.77 of it in the first steps of runs that were
# recorded, later by 0.2; of a few ranks the fullest is taken to be 1.3 standard deviations above.
_DEVIATION, _FULLEST = 0.6, 1.3
# Share of what comes and goes with rows that the allocator holds besides: rows are others in each microbatch and step, a block
# that is free serves only what is no larger, and Adam's moments come into the blocks of the first step. By the allocator's rules
# rows that were recorded need 0.19 to 0.28 on expert ranks, and most often 0.2 to 0.34 on attention ranks
# (``scripts/bench/allocator.py``).
_GAPS = 0.25
_BACKWARD = 7  # widths of a token that the backward of an attention task has at once, beside what was kept
_MOMENTS = 8  # bytes a parameter: Adam's, in fp32
_COPY = 4 + 4 + 8 + 8  # bytes of an expert's row: its probability; which row it is a copy of, and the way back
_MASTER = 4  # bytes a parameter: the fp32 copy beside half-precision weights


class Memory(NamedTuple):
    """Bytes of one rank.

    Attributes:
        weights, gradients, optimizer: of all that it holds.
        activations: of the microbatches on their way.
        transient: the largest task's own, beside these, and what waits for a transfer.
        gaps: what torch's allocator holds between them.
        overhead: of the process and its libraries.
        outside: of the overhead, what torch's allocator knows nothing of.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    transient: float
    gaps: float
    overhead: float
    outside: float

    @property
    def total(self) -> float:
        return (self.weights + self.gradients + self.optimizer + self.activations + self.transient + self.gaps
                + self.overhead)


def usable(group: GroupCosts, member: int) -> float:
    """Bytes that a plan may fill of a member's GPU."""
    return group.seats[member].pool.memory * (1 - MARGIN)


def waves_ahead(stage: int, stages: int, virtual_stages: int = 1) -> float:
    """The waves, beside the one at hand, whose activations a pipeline stage has when the first gradients come to it: one for
    each stage behind. With virtual stages what it does before counts as the part of a wave that a chunk is
    (``schedule.interleaved``)."""
    if virtual_stages == 1:
        return stages - 1 - stage
    return (2 * (stages - 1 - stage) + (virtual_stages - 1) * stages + 1) / virtual_stages - 1


def in_flight(schedule: str, wave: int, microbatches: int, layers: int, ahead: float = 0) -> float:
    """The microbatches whose activations are there at once, each counted as the share of its layers that are.

    Args:
        schedule: as in a plan; overlapped waves have one layer's more, which comes before the last wave's is gone.
        wave: R.
        microbatches: of a step.
        layers: K.
        ahead: waves that a pipeline stage has beside the one at hand (``waves_ahead``).
    """
    if schedule == "overlapped" and wave < microbatches:
        return wave * (1 + 1 / layers)
    return float(min(wave * (1 + ahead), microbatches))


def fullest(experts: int, of: int) -> float:
    """Rows of the fullest of some ranks that hold so many of all (layer, expert) pairs, over balanced routing: what pairs get
    evens out on a rank that holds many of them, and is the same on one that holds all."""
    return 1 + _FULLEST * _DEVIATION * sqrt((1 - experts / of) / experts) if experts else 1.0


def member_memory(
    group: GroupCosts, member: int, experts: int, wave: float, imbalance: float | None = None, weight_gradients: str = TOGETHER
) -> Memory:
    """Bytes of a member.

    Args:
        group: the ZP group's costs; its step says how much is recomputed and whether the optimizer is distributed.
        member: which.
        experts: all (layer, expert) pairs that it holds.
        wave: the microbatches on their way together, as ``in_flight`` counts them.
        imbalance: rows that the member's experts get, over those of balanced routing; as ``fullest`` says where not given.
        weight_gradients: as in a plan.
    """
    return _MemoryOfMember(group, member, imbalance, weight_gradients).of(experts, wave)


class _MemoryOfMember:
    """``member_memory`` for any number of experts and microbatches: a search asks for some of each member, so what depends on
    neither is worked out once."""

    def __init__(self, group: GroupCosts, member: int, imbalance: float | None, weight_gradients: str):
        shape, size = group.shape, BYTES[group.precision]
        self._group, self._moe_layers, self._size = group, len(shape.moe_layers), size
        self._dense = group.dense if member < group.attention_members else 0.0
        self._state = _MOMENTS + (_MASTER if size < 4 else 0)
        self._shares = (group.groups * group.copies, group.groups) if group.step.distributed_optimizer else (1, 1)
        self._imbalance, self._pairs = imbalance, shape.experts * len(shape.moe_layers)
        self._row_bytes = expert_row_bytes(group, member)
        copied = group.expert_tensor > 1  # addends of the tokens of all ranks that share the experts
        # Of a row in a backward: gradients of outputs and inputs; those of what comes out of the activation function and goes
        # into it, of all of a layer's experts, as they have it that run together.
        self._task_row = size * ((3 + copied) * shape.hidden + (3 if shape.gated else 2) * shape.expert_ffn / group.expert_tensor)
        self._task_expert = size * shape.expert_weights / group.expert_tensor  # a weight's gradient, until it is added
        self._until_weights = _row_bytes_until_weights(group) if weight_gradients == MERGED else 0
        self._token_bytes = attention_token_bytes(group, member) if self._dense else 0.0
        self._outside = group.seats[member].kind.memory_figures.get("overhead", OVERHEAD)
        self._width = shape.hidden * size  # bytes of a token's hidden state

    def of(self, experts: int, wave: float) -> Memory:
        """Bytes with so many (layer, expert) pairs and microbatches on their way."""
        group, dense = self._group, self._dense
        routed = experts * group.shape.expert_weights / group.expert_tensor
        rows = group.expert_tokens * (fullest(experts, self._pairs) if self._imbalance is None else self._imbalance)
        activations, transient = wave * experts * rows * self._row_bytes, 0.0
        per_layer = -(-experts // self._moe_layers)  # of the layer at hand
        if experts:
            transient = per_layer * (rows * (self._task_row + wave * self._until_weights) + self._task_expert)
        if dense:
            transient = max(transient, self._head, self._task) + self._gathered
        waiting = wave * self._width * (per_layer * rows + (group.rank_tokens * most_rows(group) if dense else 0))
        gaps = _GAPS * (activations + transient)
        kept, graphs = (wave * self._kept, self._graphs(wave)) if dense else (0.0, 0.0)
        return Memory(
            weights=(dense + routed) * self._size,
            gradients=(dense + routed) * GRADIENT_BYTES[group.precision],
            optimizer=self._state * (dense / self._shares[0] + routed / self._shares[1]),
            activations=activations + kept, transient=transient + waiting + graphs, gaps=gaps,
            overhead=self._outside + _WORKSPACES, outside=self._outside,
        )

    @cached_property
    def _keys(self) -> float:
        """Of keys and values of a whole sequence, of which a rank has a part itself."""
        return self._group.rank_tokens * self._group.shape.key_value_width * self._size

    @cached_property
    def _kept(self) -> float:
        """What an attention rank keeps of a microbatch."""
        group, shape = self._group, self._group.shape
        keys = (group.context - 1) * self._keys * (group.step.recompute == "none")
        # Of what predicts a further token: a later one's embedding and the hidden state, as they come and normed, and the
        # result, which the head gets.
        further = shape.mtp_layers * 5 * shape.hidden * self._size
        return shape.layers * (group.rank_tokens * self._token_bytes + keys) + group.rank_tokens * further

    @cached_property
    def _head(self) -> float:
        """A head's backward: what softmax made of the logits and its gradient, both in fp32, that gradient in the weights' type,
        and the gradient of the weights. Of several heads, whose backwards begin together, what softmax made of each."""
        group, heads = self._group, (1 + self._group.shape.mtp_layers) * self._group.ends
        logits = group.rank_tokens * group.step.vocabulary
        weights = group.step.vocabulary * self._width / group.tensor
        return logits * (4 * heads + 4 + self._size) + weights if heads else 0.0

    @cached_property
    def _task(self) -> float:
        """The backward of an attention task, with the permuted tokens' gradients."""
        return (_BACKWARD + most_rows(self._group)) * self._group.rank_tokens * self._width

    def _graphs(self, wave: float) -> float:
        """Memory that CUDA graphs of attention have to themselves: in each layer a copy of a microbatch's input; for each
        microbatch what a forward needs and does not keep; and once what backwards need, with the buffers that all share."""
        if not self._group.step.cuda_graphs:
            return 0.0
        layers, rows = len(self._group.shape.moe_layers), most_rows(self._group)
        widths = wave * (layers + rows + 2) + 2 * (_BACKWARD + rows)
        return widths * self._group.rank_tokens * self._width

    @cached_property
    def _gathered(self) -> float:
        """Ranks that share a microbatch gather its tokens, or keys and values of a sequence, and the gradients of these."""
        group = self._group
        tokens = (group.tensor - 1) * group.rank_tokens * group.shape.hidden * self._size
        return 2 * tokens + 2 * (group.context - 1) * self._keys


def most_imbalance(group: GroupCosts, experts: int) -> float:
    """Rows that a member's experts get when every token goes to as many of them as it can, over balanced routing.

    Args:
        group: the ZP group's costs.
        experts: all (layer, expert) pairs that the member holds, spread evenly over layers.
    """
    shape = group.shape
    per_layer = experts / len(shape.moe_layers)
    return min(shape.topk, per_layer) * shape.experts / (shape.topk * per_layer)


def imbalance_that_fits(
    group: GroupCosts, member: int, experts: int, wave: float, weight_gradients: str = TOGETHER
) -> float:
    """How uneven routing may become before a member's GPU is full, its margin used up too: the rows of its experts
    over those of balanced routing, and at most ``most_imbalance``. For one that holds experts."""
    low, high = 0.0, most_imbalance(group, experts)
    full = group.seats[member].pool.memory
    if member_memory(group, member, experts, wave, high, weight_gradients).total <= full:
        return high
    while high - low > 0.01:
        middle = (low + high) / 2
        fits = member_memory(group, member, experts, wave, middle, weight_gradients).total <= full
        low, high = (middle, high) if fits else (low, middle)
    return low


def expert_row_bytes(group: GroupCosts, member: int) -> float:
    """What a holder keeps of a row until its backward: the input, what goes into the activation function and, unless
    that runs again, comes out of it, the probability, indexes. Ranks that share experts have the input of all their rows each, and
    keep what they were sent themselves where all of it runs again."""
    figures, again = group.seats[member].kind.memory_figures, group.step.activation_again
    measured = f"expert_activation{'_again' if again else ''}_per_row"
    shape, size, shares = group.shape, BYTES[group.precision], group.expert_tensor
    row = size * shape.hidden
    if measured in figures:
        return row + (figures[measured] - row) / shares if shares > 1 else figures[measured]
    if group.step.recompute == "full":
        return row / shares + _COPY
    return row + size * ((3 if shape.gated else 2) - again) * shape.expert_ffn / shares + _COPY


def _row_bytes_until_weights(group: GroupCosts) -> float:
    """What a holder keeps of a row from its backward until a W task for the wave, beyond what it kept before: the second
    product's gradient, what the backward has made again, and in the W task a copy of that product's rows and gradient in
    the experts' order. The first product's gradient comes as what it was made from goes, where that was kept."""
    shape, step = group.shape, group.step
    inner = shape.expert_ffn / group.expert_tensor
    row = shape.hidden + (shape.hidden + inner)
    if step.recompute == "full":
        row += shape.hidden + (3 if shape.gated else 2) * inner
    elif step.activation_again:
        row += inner
    return BYTES[group.precision] * row


def most_rows(group: GroupCosts) -> int:
    """The holders that a token may go to, each once."""
    return min(group.shape.topk, group.members)


def attention_token_bytes(group: GroupCosts, member: int) -> float:
    """What an attention rank keeps of a token and layer until its backward."""
    kind, shape, size = group.seats[member].kind, group.shape, BYTES[group.precision]
    if "attention_activation_per_token" in kind.memory_figures:
        return kind.memory_figures["attention_activation_per_token"]
    # The residual, and the experts' outputs, which the end of the layer is differentiated by.
    kept = size * (shape.hidden + most_rows(group) * shape.hidden)
    if group.step.recompute == "full":
        return kept
    inside = 3 * shape.query_width + 3 * shape.query_groups * shape.head_dim
    if shape.kv_lora_rank:
        # Queries before and after rotary, keys, values and output of all heads, what keys and values are taken from, and the
        # latent ones before and after their norm.
        expanded = shape.heads * (shape.qk_head_dim + shape.v_head_dim)
        inside = 3 * shape.query_width + 2 * shape.value_width + expanded + 2 * shape.latent_width
    kept += size * (4 * shape.hidden + inside) + 8 * shape.experts + 4 * shape.heads
    if shape.shared_expert_ffn:
        kept += size * 3 * shape.shared_expert_ffn
    if kind.estimated and not kind.device.flash_attention and group.step.recompute == "none":
        kept += 2 * size * shape.heads * shape.sequence  # scores before and after softmax
    return kept


def most_experts(group: GroupCosts, member: int, wave: float, weight_gradients: str = TOGETHER) -> int:
    """The most (layer, expert) pairs that fit on a member; -1 when not even none does."""
    limit, memory = usable(group, member), _MemoryOfMember(group, member, None, weight_gradients)

    def total(experts: int) -> float:
        return memory.of(experts, wave).total

    low, high = 0, group.shape.experts * len(group.shape.moe_layers)
    if (high_total := total(high)) <= limit:
        return high
    if (low_total := total(low)) > limit:
        return -1
    guessing = True  # by turns, since what a layer's experts need at once makes steps
    while high - low > 1:
        share = (limit - low_total) / (high_total - low_total) if guessing else 0.5
        middle = min(high - 1, max(low + 1, low + int(share * (high - low))))
        if (found := total(middle)) <= limit:
            low, low_total = middle, found
        else:
            high, high_total = middle, found
        guessing = not guessing
    return low
