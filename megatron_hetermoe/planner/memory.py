"""What each rank must hold: weights, gradients, optimizer state, activations of the microbatches on their way.

Where a profile has measured figures they replace the arithmetic here.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_hetermoe.config.plan import MERGED, TOGETHER
from megatron_hetermoe.cost.group import BYTES, GRADIENT_BYTES, GroupCosts

MARGIN = 0.10  # share of a GPU's memory that a plan leaves free, for fragmentation and what nobody counted
IMBALANCE = 1.25  # rows that an expert may get, over balanced routing
OVERHEAD = 1.5e9  # bytes: context, communicators of both channels and of the pool, libraries' workspaces
_MOMENTS = 8  # bytes a parameter: Adam's, in fp32
_COPY = 4 + 4 + 8 + 8  # bytes of an expert's row: its probability; which row it is a copy of, and the way back
_MASTER = 4  # bytes a parameter: the fp32 copy beside half-precision weights


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights, gradients, optimizer: of all that it holds.
        activations: of the microbatches on their way.
        transient: the largest task's own, beside these.
        overhead: of the process.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    transient: float
    overhead: float

    @property
    def total(self) -> float:
        return (self.weights + self.gradients + self.optimizer + self.activations + self.transient + self.overhead)


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


def member_memory(
    group: GroupCosts, member: int, experts: int, wave: float, imbalance: float = IMBALANCE, weight_gradients: str = TOGETHER
) -> Memory:
    """Bytes of a member.

    Args:
        group: the ZP group's costs; its step says how much is recomputed and whether the optimizer is distributed.
        member: which.
        experts: all (layer, expert) pairs that it holds.
        wave: the microbatches on their way together, as ``in_flight`` counts them.
        imbalance: rows that the member's experts get, over those of balanced routing.
        weight_gradients: as in a plan.
    """
    shape, step = group.shape, group.step
    figures = group.seats[member].kind.memory_figures
    dense = group.dense if member < group.attention_members else 0.0
    routed = experts * shape.expert_weights / group.expert_tensor
    state = _MOMENTS + (_MASTER if BYTES[group.precision] < 4 else 0)
    shares = (group.groups * group.copies, group.groups) if step.distributed_optimizer else (1, 1)
    rows = group.expert_tokens * imbalance
    activations = wave * experts * rows * expert_row_bytes(group, member)
    transient = 0.0
    if experts:
        # The layer at hand: gradients of its outputs, of its inputs and inside one expert.
        per_layer = -(-experts // len(shape.moe_layers))
        size = BYTES[group.precision]
        copied = group.expert_tensor > 1  # addends of the tokens of all ranks that share the experts
        transient = rows * size * ((3 + copied) * per_layer * shape.hidden + 4 * shape.expert_ffn / group.expert_tensor)
        if weight_gradients == MERGED:
            transient += wave * per_layer * rows * _row_bytes_until_weights(group)
    if dense:
        tokens = group.rank_tokens
        activations += wave * tokens * shape.layers * attention_token_bytes(group, member)
        # Keys and values of a whole sequence, of which a rank has a part itself.
        keys = tokens * shape.key_value_width * BYTES[group.precision]
        activations += wave * shape.layers * (group.context - 1) * keys * (step.recompute == "none")
        # Of what predicts a further token: a later one's embedding and the hidden state, as they come and normed, and the
        # result, which the head gets.
        activations += wave * tokens * shape.mtp_layers * 5 * shape.hidden * BYTES[group.precision]
        # Logits with their gradient, in the weights' type and in fp32, or the permuted tokens of a layer.
        logits = tokens * step.vocabulary * 2 * (BYTES[group.precision] + 4) * (1 + shape.mtp_layers) * group.ends
        permuted = 4 * tokens * most_rows(group) * shape.hidden * BYTES[group.precision]
        # Ranks that share a microbatch gather its tokens, or keys and values of a sequence, and the gradients of these.
        gathered = 2 * (group.tensor - 1) * tokens * shape.hidden * BYTES[group.precision] + 2 * (group.context - 1) * keys
        transient = max(transient, logits, permuted) + gathered
    return Memory(
        weights=(dense + routed) * BYTES[group.precision],
        gradients=(dense + routed) * GRADIENT_BYTES[group.precision],
        optimizer=state * (dense / shares[0] + routed / shares[1]),
        activations=activations, transient=transient, overhead=figures.get("overhead", OVERHEAD),
    )


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
    limit = usable(group, member)

    def total(experts: int) -> float:
        return member_memory(group, member, experts, wave, weight_gradients=weight_gradients).total

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
