"""A ZP group: who is in it, and what each of its members takes for an attention task, an expert, a link or a reduction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from megatron_hetermoe.config.shape import ModelShape, together
from megatron_hetermoe.config.step import Step
from megatron_hetermoe.cost.cluster import Cluster, ClusterPool, Kind
from megatron_hetermoe.cost.work import (
    Numbers, Work, attention_work, crossing_share, dense_parameters, embedding_work, feed_forward_work, head_work,
    projection_width,
)
from megatron_hetermoe.schedule.numbering import first_numbers
from megatron_hetermoe.schedule.tasks import Kind as TaskKind
from megatron_hetermoe.schedule.tasks import Stream

if TYPE_CHECKING:
    import numpy as np

_Price = TypeVar("_Price")

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
GRADIENT_BYTES = {"fp32": 4, "bf16": 4, "fp16": 2}  # Megatron accumulates bf16's gradients in fp32
_PROBABILITY = 4  # bytes; the router's precision
_INDEX = 4  # bytes; which row a copy is of

_TENSORS = {TaskKind.DISPATCH: 2}  # of a transfer with each peer; of others one

# A member's links: to its own node and to others, in both directions.
LINKS = 4
INTRA_OUT, INTRA_IN, INTER_OUT, INTER_IN = range(LINKS)


@dataclass(frozen=True)
class Seat:
    """Where a member of a ZP group sits.

    Attributes:
        pool: of the cluster.
        kind: what its GPU costs.
        node: two members are on one node if pool and node agree.
    """

    pool: ClusterPool
    kind: Kind
    node: int


def seats_of(pools: Sequence[str], cluster: Cluster, kinds: Mapping[str, Kind]) -> tuple[Seat, ...]:
    """The members' seats: those of a pool fill its nodes one by one."""
    taken: dict[str, int] = {}
    seats = []
    for name in pools:
        index = taken.get(name, 0)
        taken[name] = index + 1
        seats.append(Seat(cluster.pools[name], kinds[name], index // cluster.pools[name].gpus_per_node))
    return tuple(seats)


class _Parts(NamedTuple):
    """What an A task is made of, in that order."""

    embedding: bool
    dense: bool
    heads: int
    projection: bool
    attention: bool
    shared: bool


@lru_cache(maxsize=256)
def _parts_of(shape: ModelShape, begins: bool, ends: bool) -> tuple[_Parts, ...]:
    """What A_1 to A_{K+1} are made of: A_k is the end of layer k-1 with attention and router of layer k
    (``schedule.tasks``). Only the first pipeline stage has the embedding, only the last one the head. Each further token that
    is predicted has an embedding, a head and a loss."""
    moe = frozenset(shape.moe_layers)

    def parts(layer: int) -> _Parts:
        predicts = shape.decoder_layers < layer <= shape.layers
        return _Parts(
            embedding=begins and layer == 1 or predicts, dense=layer > 1 and layer - 1 not in moe,
            heads=1 + shape.mtp_layers if ends and layer > shape.layers else 0, projection=predicts,
            attention=layer <= shape.layers, shared=layer in moe and shape.shared_expert_ffn > 0,
        )

    return tuple(map(parts, range(1, shape.layers + 2)))


@lru_cache(maxsize=256)
def _distinct_parts(chunks: tuple[tuple[ModelShape, bool, bool], ...]) -> tuple[tuple[_Parts, ...], tuple[int, ...]]:
    """What A tasks of these chunks are made of, each sort once, and the sort of each task."""
    parts = [one for chunk in chunks for one in _parts_of(*chunk)]
    distinct = tuple(dict.fromkeys(parts))
    return distinct, tuple(map(distinct.index, parts))


@lru_cache(maxsize=4096)
def _priced_parts(
    kind: Kind, shape: ModelShape, micro_batch: int, vocabulary: int, recompute: str, parts: _Parts
) -> tuple[tuple[tuple[float, float], Work], ...]:
    """The parts with seconds, forward and backward, and work. A search asks for the same ones for thousands of layouts."""
    tokens = micro_batch * shape.sequence

    def feed_forward(width: int) -> tuple[tuple[float, float], Work]:
        return kind.feed_forward(width, tokens, recompute), feed_forward_work(shape, width, tokens)

    found = []
    if parts.embedding:
        found.append((kind.embedding(tokens), embedding_work(shape, tokens)))
    if parts.dense:
        found.append(feed_forward(shape.dense_ffn))
    if parts.heads:
        found += [(kind.head(vocabulary, tokens), head_work(shape, vocabulary, tokens))] * parts.heads
    if parts.projection:
        found.append(feed_forward(projection_width(shape)))
    if parts.attention:
        found += [(kind.attention(shape.sequence, recompute), attention_work(shape, shape.sequence))] * micro_batch
    if parts.shared:
        found.append(feed_forward(shape.shared_expert_ffn))
    return tuple(found)


@dataclass(frozen=True)
class GroupCosts:
    """What does not depend on the placement: one ZP group's parts, priced.

    Attributes:
        shape: the model's.
        step: what a step does.
        seats: the members', attention ranks first.
        attention_members: M.
        groups: G.
        precision: of parameters and activations.
        tensor: attention ranks that share the dense weights and a microbatch (tensor and sequence parallelism).
        merged: microbatches whose W task is in equal parts in the experts' backwards (``amortised``); 0 where it is not.
        expert_tensor: expert ranks that share the weights of their experts, and are one member together; its figures are
            those of each of them. Attention ranks hold no expert then.
        stage, stages: which pipeline stage's group it is, of how many; the shape is that of its layers.
        context: attention ranks, or tensor-parallel groups of them, that have parts of one sequence.
        chunks: the shapes of a stage's chunks, where it has several; tasks number their layers as ``schedule.numbering`` says.
        hosts_count: whether what queueing tasks takes a host is counted, where it is known.
    """

    shape: ModelShape
    step: Step
    seats: tuple[Seat, ...]
    attention_members: int
    groups: int
    precision: str
    tensor: int = 1
    expert_tensor: int = 1
    stage: int = 0
    stages: int = 1
    merged: int = 0
    context: int = 1
    chunks: tuple[ModelShape, ...] = ()
    hosts_count: bool = True

    @property
    def members(self) -> int:
        return len(self.seats)

    @property
    def begins(self) -> bool:
        """Whether it has the embedding."""
        return self.stage == 0

    @property
    def ends(self) -> bool:
        """Whether it has the head."""
        return self.stage == self.stages - 1

    def of_stages(self, stage_layers: Sequence[int], virtual_stages: int = 1) -> tuple[GroupCosts, ...]:
        """The groups of the pipeline stages that layers are divided into as in a plan; itself where there is one stage."""
        if len(stage_layers) < 2:
            return (self,)
        ends, stages = list(accumulate(stage_layers, initial=0)), len(stage_layers) // virtual_stages
        parts = [self.shape.of_layers(range(first + 1, last + 1)) for first, last in pairwise(ends)]
        of_stages = [tuple(parts[stage::stages]) for stage in range(stages)]
        return tuple(
            replace(self, shape=together(chunks), stage=stage, stages=stages, chunks=chunks if virtual_stages > 1 else ())
            for stage, chunks in enumerate(of_stages)
        )

    @cached_property
    def _chunks(self) -> tuple[tuple[ModelShape, bool, bool], ...]:
        """The shape of each chunk, or of the stage, and whether it has the embedding, and the head."""
        shapes = self.chunks or (self.shape,)
        return tuple((shape, self.begins and place == 0, self.ends and place == len(shapes) - 1)
                     for place, shape in enumerate(shapes))

    @property
    def firsts(self) -> tuple[int, ...]:
        """The number in tasks of each chunk's first layer."""
        return first_numbers([shape.layers for shape, _, _ in self._chunks])

    @cached_property
    def dense(self) -> float:
        """Weights of an attention rank's dense part."""
        return sum(dense_parameters(shape, self.step.vocabulary, *ends) for shape, *ends in self._chunks) / self.tensor

    @cached_property
    def alike(self) -> dict[tuple[bool, str], tuple[int, ...]]:
        """The members by whether they are attention ranks, and by pool: those of one sort cost the same."""
        found: dict[tuple[bool, str], list[int]] = {}
        for member, seat in enumerate(self.seats):
            found.setdefault((member < self.attention_members, seat.pool.name), []).append(member)
        return {sort: tuple(members) for sort, members in found.items()}

    @property
    def copies(self) -> int:
        """Copies of the dense part in the ZP group."""
        return self.attention_members // self.tensor

    @property
    def replicas(self) -> int:
        """Microbatches that the ZP group's attention ranks are at work on at once."""
        return self.copies // self.context

    @property
    def rank_tokens(self) -> float:
        """Tokens of a microbatch that one attention member owns."""
        return self.step.micro_batch * self.shape.sequence / (self.tensor * self.context)

    @cached_property
    def expert_tokens(self) -> float:
        """Tokens that one expert gets from one microbatch of all attention members, with balanced routing."""
        return self.rows_per_expert * self.attention_members

    @cached_property
    def rows_per_expert(self) -> float:
        """Tokens that one attention member sends to one expert, with balanced routing."""
        return self.rank_tokens * self.shape.topk / self.shape.experts

    @cached_property
    def attention(self) -> tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]:
        """For each attention member, seconds of its A tasks of layers 1 to K+1, forward and backward."""
        seats = self.seats[:self.attention_members]
        known = {
            name: tuple(zip(*self._of_layers(lambda parts, seat=seat: self._attention_task(seat, parts))))
            for name, seat in {seat.pool.name: seat for seat in seats}.items()
        }
        return tuple(known[seat.pool.name] for seat in seats)

    @cached_property
    def attention_weights(self) -> tuple[tuple[float, ...], ...]:
        """For each attention member, what W tasks take of the backward of its A tasks of layers 1 to K+1, in seconds."""
        return tuple(
            tuple(self._of_layers(lambda parts, kind=seat.kind: sum(
                self._weights(seconds, work) for seconds, work in self._priced(kind, parts)) / (self.tensor * self.context)))
            for seat in self.seats[:self.attention_members]
        )

    def _of_layers(self, price: Callable[[_Parts], _Price]) -> list[_Price]:
        """The price of A_1 to A_{K+1}, of each chunk: each once of those that are made of the same parts."""
        distinct, numbers = _distinct_parts(self._chunks)
        known = [price(one) for one in distinct]
        return [known[number] for number in numbers]

    def expert_weights(self, member: int, microbatches: int = 1) -> float:
        """What a W task of a member takes of an expert's backward on its tokens of so many microbatches, in seconds.

        The backward of all these at once reads and adds to the weights' gradients once, so it takes less than that many."""
        tokens = microbatches * self.expert_tokens
        return self._weights(self._expert_task(self.seats[member], tokens), feed_forward_work(
            self.shape, self.shape.expert_ffn, tokens))

    def _weights(self, seconds: tuple[float, float], work: Work) -> float:
        """The weights' part of a backward, by its share of the operations: nothing measures the two apart."""
        again = seconds[0] if self.step.recompute == "full" else 0.0
        return max(0.0, seconds[1] - again) * work.weight_share

    @cached_property
    def expert(self) -> tuple[tuple[float, float], ...]:
        """For each member, seconds of one expert on its tokens of one microbatch, forward and backward."""
        known: dict[str, tuple[float, float]] = {}
        for member, seat in enumerate(self.seats):
            if seat.pool.name not in known:
                forward, backward = self._expert_task(seat, self.expert_tokens)
                if self.merged:
                    backward += self.expert_weights(member, self.merged) / self.merged - self.expert_weights(member)
                known[seat.pool.name] = forward, backward
        return tuple(known[seat.pool.name] for seat in self.seats)

    @cached_property
    def expert_task(self) -> tuple[tuple[float, float], ...]:
        """For each member, seconds of an E task, forward and backward, beside those of its experts."""
        return tuple(seat.kind.expert_task(self.step.recompute) for seat in self.seats)

    def expert_seconds(self, member: int, way: int, held: int) -> float:
        """Of an E task of a member that holds so many experts of the layer, forward (0) or backward (1)."""
        return held and self.expert_task[member][way] + held * self.expert[member][way]

    @cached_property
    def has_host(self) -> bool:
        """Whether queueing tasks costs any member's host something that is counted."""
        seats = (self.seats[members[0]] for members in self.alike.values())
        return self.hosts_count and any(seat.kind.has_host or any(seat.pool.channel_host) for seat in seats)

    @cached_property
    def host_attention(self) -> tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]:
        """For each attention member, seconds in which its host queues its A tasks of layers 1 to K+1, forward and backward.
        A task of several sequences is queued as fast as one of one, and a part of one by ranks that share it as fast as the
        whole."""
        known = {
            name: tuple(zip(*self._of_layers(lambda parts, kind=kind: self._host_attention_task(kind, parts))))
            for name, kind in {seat.pool.name: seat.kind for seat in self.seats[:self.attention_members]}.items()
        }
        return tuple(known[seat.pool.name] for seat in self.seats[:self.attention_members])

    def _host_attention_task(self, kind: Kind, of: _Parts) -> tuple[float, float]:
        if not self.hosts_count:
            return 0.0, 0.0
        recompute, none = self.step.recompute, "none"
        parts = [kind.host("embedding", none)] * of.embedding + [kind.host("head", none)] * of.heads
        parts += [kind.host("attention", recompute)] * of.attention
        # Dense parts are not measured: as an E task of one expert.
        dense = of.dense + of.projection + of.shared
        parts += [kind.host(name, recompute) for name in ("expert", "expert_task")] * dense
        return sum(part[0] for part in parts), sum(part[1] for part in parts)

    @cached_property
    def host_experts(self) -> tuple[tuple[tuple[float, float], tuple[float, float]], ...]:
        """For each member, seconds in which its host queues an E task, for each expert and beside them, both forward and backward."""
        if not self.hosts_count:
            return (((0.0, 0.0), (0.0, 0.0)),) * self.members
        return tuple(tuple(seat.kind.host(part, self.step.recompute) for part in ("expert", "expert_task")) for seat in self.seats)

    def host_expert(self, member: int, way: int, held: int) -> float:
        """Seconds in which a member's host queues an E task, forward (0) or backward (1), of so many experts."""
        each, task = self.host_experts[member]
        return held and task[way] + held * each[way]

    @cached_property
    def _host_transfers(self) -> tuple[tuple[float, ...], ...]:
        """For each member, seconds in which its host queues a transfer, by the number of tensors; empty if unknown."""
        return tuple(seat.pool.channel_host if self.hosts_count else () for seat in self.seats)

    def host_transfer(self, member: int, kind: TaskKind) -> float:
        """Seconds in which a member's host queues a D, C or H task, of either pass."""
        known = self._host_transfers[member]
        return known[_TENSORS.get(kind, 1) - 1] if known else 0.0

    def amortised(self, wave: int) -> GroupCosts:
        """These costs where weights' gradients are merged (``config.plan.MERGED``), with an equal part of a W task in each
        microbatch's backward: for searches that simulate no W tasks."""
        return replace(self, merged=wave)

    def _expert_task(self, seat: Seat, tokens: float) -> tuple[float, float]:
        """Seconds of one expert on so many tokens. Ranks that share it do an equal part of its width each, on the tokens of
        all, which are copied among them before and whose addends come back after, in both passes (``mcore.tasks``)."""
        kind, shares, recompute = seat.kind, self.expert_tensor, self.step.recompute
        again = kind.activation_again(tokens) / shares if self.step.activation_again else 0.0
        if shares == 1:
            forward, backward = kind.expert(tokens, recompute)
            return forward, backward + again
        forward, backward = kind.feed_forward(self.shape.expert_ffn // shares, tokens, recompute)
        size = tokens * self.shape.hidden * BYTES[self.precision] / shares
        # One copy carries the tokens of all experts that a holder has of a layer, each once.
        held = max(1.0, self.shape.experts / (self.members - self.attention_members))
        size *= crossing_share(self.shape, held) * self.shape.experts / (held * self.shape.topk)
        copies = 2 * (shares - 1) * (size / seat.pool.intra.bandwidth + seat.pool.intra.latency / held)
        return forward + copies, backward + again + copies * (2 if recompute == "full" else 1)

    def _attention_task(self, seat: Seat, of: _Parts) -> tuple[float, float]:
        """Seconds of an A task, forward and backward.

        Ranks that share it do an equal part each. Around each of its parts, forward, ranks that share its weights gather
        tokens and scatter their sums; backward the same, and the tokens are gathered once more for the weights' gradients.
        Ranks that have parts of a sequence gather keys and values, and scatter their gradients.
        """
        parts = [seconds for seconds, _ in self._priced(seat.kind, of)]
        times = sum(part[0] for part in parts), sum(part[1] for part in parts)
        if self.tensor == self.context == 1:
            return times
        shared = sum(1 for part in parts if sum(part))
        again = self.step.recompute == "full" and not of.heads
        tokens = self._ring_seconds(seat, self.tensor, self.shape.hidden, self.context)
        keys = of.attention * self._ring_seconds(seat, self.context, self.shape.key_value_width, self.tensor)
        return tuple(
            seconds / (self.tensor * self.context) + shared * of_tokens * tokens + of_keys * keys
            for seconds, of_tokens, of_keys in zip(times, (2, 3 + 2 * again), (1, 1 + again))
        )

    def _ring_seconds(self, seat: Seat, ranks: int, width: int, parts: int) -> float:
        """Of gathering on so many ranks what all have of a microbatch's tokens, so wide, or scattering its sums, in a ring
        inside a node; of all tokens each of other ``parts`` of the ranks has its own."""
        size = self.step.micro_batch * self.shape.sequence * width * BYTES[self.precision] / parts
        return (ranks - 1) * (size / ranks / seat.pool.intra.bandwidth + seat.pool.intra.latency)

    def _priced(self, kind: Kind, parts: _Parts) -> tuple[tuple[tuple[float, float], Work], ...]:
        """Those parts, each with its seconds, on a GPU of its own."""
        return _priced_parts(kind, self.shape, self.step.micro_batch, self.step.vocabulary, self.step.recompute, parts)

    def exchanged(self, kind: TaskKind, stream: Stream, held: Numbers) -> Numbers:
        """Bytes of a transfer between an attention member and holders, with balanced routing.

        A token crosses once, whichever number of the holder's experts it goes to; for each of these dispatch carries a
        probability and an index, and its backward a probability's gradient. Headers are not counted.

        Args:
            kind: dispatch or combine.
            stream: the channel.
            held: experts that each holder has of the layer, one or an array.
        """
        row = self.shape.hidden * BYTES[self.precision]
        copy = 0 if kind is TaskKind.COMBINE else _PROBABILITY + _INDEX if stream is Stream.OUT else _PROBABILITY
        return row * self.rank_tokens * crossing_share(self.shape, held) + copy * self.rows_per_expert * held

    @cached_property
    def latency(self) -> float:
        """Seconds until a transfer's first byte is there; what was measured of a channel has it in it."""
        if self.seats[0].pool.channel:
            return 0.0
        across = len({(seat.pool.name, seat.node) for seat in self.seats}) > 1
        links = [seat.pool.inter if across else seat.pool.intra for seat in self.seats]
        return max(link.latency for link in links)

    @cached_property
    def _reach(self) -> tuple[np.ndarray, np.ndarray]:
        """[owner, holder]: 1 where they are on one node, and 1 where on two; both 0 for a member and itself."""
        import numpy as np

        nodes = [(seat.pool.name, seat.node) for seat in self.seats]
        same = np.array([[one == other for other in nodes] for one in nodes[:self.attention_members]], float)
        intra = same - np.eye(self.attention_members, self.members)
        return intra, 1 - same

    @cached_property
    def _bandwidth(self) -> np.ndarray:
        """[member, link], bytes a second."""
        import numpy as np

        known = {}
        for name, pool in {seat.pool.name: seat.pool for seat in self.seats}.items():
            intra, inter = pool.intra.bandwidth, pool.rank_inter.bandwidth
            known[name] = intra, intra, inter, inter
        return np.array([known[seat.pool.name] for seat in self.seats])

    @cached_property
    def _holder_shares(self) -> np.ndarray:
        """[members]: what each rank of a holder gets of its tokens; an owner's go to one of them."""
        import numpy as np

        owners = self.attention_members
        share = -(-owners // self.expert_tensor) / owners
        return np.array([1.0] * owners + [share] * (self.members - owners))

    @property
    def handover(self) -> int:
        """Bytes that an attention rank hands over to a stage beside its own, for a microbatch."""
        return round(self.rank_tokens * self.shape.hidden * BYTES[self.precision])

    def handover_seconds(self, member: int) -> float:
        """Of handing that over, between nodes where the pool has more than one: stages are next to each other in rank
        order, with all ZP groups of a stage between. Channels of the same ranks are not slowed down by it."""
        pool = self.seats[member].pool
        link = pool.intra if pool.nodes == 1 else pool.rank_inter
        return link.latency + self.handover / link.bandwidth

    def link_seconds(self, kind: TaskKind, stream: Stream, experts: np.ndarray) -> np.ndarray:
        """How long a transfer alone occupies each link.

        Args:
            kind: dispatch or combine.
            stream: the channel.
            experts: [..., members], how many experts of the layer each member holds.

        Returns:
            [..., members, LINKS] in seconds, latency not counted. What a member sends itself is a copy and not there.
        """
        import numpy as np

        owners = self.attention_members
        size = self.exchanged(kind, stream, experts)
        loads = np.zeros((*experts.shape, LINKS))
        at_holders = size * self._holder_shares
        leaving, entering = ((INTRA_OUT, INTER_OUT), (INTRA_IN, INTER_IN))
        if stream is Stream.BACK:
            leaving, entering = entering, leaving
        for reach, at_owner, at_holder in zip(self._reach, leaving, entering):
            loads[..., :owners, at_owner] += size @ reach.T
            loads[..., at_holder] += at_holders * reach.sum(axis=0)
        seconds = loads / self._bandwidth
        channel = self.seats[0].pool.channel
        if channel:
            # What was measured is the time by the bytes of the busiest rank; links keep their shares of it.
            most = loads.max(axis=(-1, -2))
            measured = np.vectorize(channel, otypes=[float])(most)
            longest = seconds.max(axis=(-1, -2))
            seconds = seconds * np.where(longest > 0, measured / np.where(longest > 0, longest, 1), 0)[..., None, None]
        return seconds

    def reduction(self, member: int, experts: int) -> float:
        """Seconds of a member's gradient reduction after its last task, with rings (2(n-1)/n of the bytes).

        Args:
            member: whose.
            experts: all (layer, expert) pairs that it holds.
        """
        size = GRADIENT_BYTES[self.precision]
        routed = experts * self.shape.expert_weights / self.expert_tensor
        seconds = self._ring(member, routed * size, self.groups, shared=True)
        if member < self.attention_members:
            seconds += self._ring(member, self.dense * size, self.groups * self.copies, shared=self.tensor > 1)
            if self.stages > 1 and self.shape.tied_embeddings and (self.begins or self.ends):
                # The embedding is on the first stage and on the last.
                seconds += self._ring(member, self.step.vocabulary * self.shape.hidden / self.tensor * size, 2, shared=True)
        return seconds

    def _ring(self, member: int, size: float, ranks: int, shared: bool) -> float:
        """A ring over all ranks of a pool enters and leaves a node once; rings of single holders share its link."""
        if ranks < 2 or not size:
            return 0.0
        pool = self.seats[member].pool
        inside = not shared and ranks <= pool.gpus_per_node
        link = pool.intra if inside else pool.rank_inter if shared else pool.inter
        bandwidth = min(link.bandwidth, pool.intra.bandwidth)
        return 2 * (ranks - 1) / ranks * size / bandwidth + 2 * (ranks - 1) * link.latency

    def optimizer(self, member: int, experts: int) -> float:
        """Seconds of a member's optimizer step, arguments as for reduction."""
        share = self.groups if self.step.distributed_optimizer else 1
        parameters = experts * self.shape.expert_weights / self.expert_tensor / share
        if member < self.attention_members:
            share = self.groups * self.copies if self.step.distributed_optimizer else 1
            parameters += self.dense / share
        return self.seats[member].kind.optimizer(parameters)
