"""The executor and the transfers, driven by callables without a model."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RanksFailed, run_function

from megatron_hetermoe.runtime import executor
from megatron_hetermoe.runtime.channels import Channel, blocks
from megatron_hetermoe.runtime.copies import by_expert, from_labels, labels_of
from megatron_hetermoe.runtime.streams import HostStreams
from megatron_hetermoe.runtime.transfers import Routed, Transfers, TransferSizes, _in_words
from megatron_hetermoe.schedule.orders import zebra
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream
from megatron_hetermoe.topology.placement import Placement

HIDDEN = 4
# Two attention members and two expert members; member 1 holds an expert too, and member 3 none in layer 2.
PLACEMENT = Placement(((2, 3, 3, 1), (2, 2, 2, 2)), 4)
ATTENTION, LAYERS, MICROBATCHES = 2, 2, 5
# With five members, the last two are one holder.
HOLDERS = {4: (), 5: ((0,), (1,), (2,), (3, 4))}


# Of the holder's experts, by their number.
ORDER = {1: (0,), 2: (1, 0), 4: (2, 0, 3, 1)}


def rows_of_copies(made: Routed) -> torch.Tensor:
    """For each copy of an owner, the row of all that it sends."""
    starts = torch.tensor([0, *made.sizes.rows]).cumsum(0)[:-1].repeat_interleave(torch.tensor(made.sizes.copies))
    index, _ = from_labels(made.labels, made.probs.dtype)
    return index[:-1] + starts


def transfers_of(rank: int, world: int, dtype: torch.dtype = torch.float32, hidden: int = HIDDEN) -> Transfers:
    groups = [dist.new_group(list(range(world))) for _ in range(2)]
    out, back = (Channel(group, group, range(world), rank) for group in groups)
    return Transfers(PLACEMENT, ATTENTION, rank, out, back, hidden, dtype, torch.device("cpu"), HOLDERS[world],
                     row_order=lambda layer: ORDER[len(PLACEMENT.held(layer, min(rank, 3)))])


class FakeModel:
    """Attention makes up tokens; experts double their copies and add the probability; gradients come back tripled."""

    def __init__(self, transfers: Transfers, delay: random.Random | None):
        self.transfers, self.delay, self.checked = transfers, delay, 0
        self.place = max(0, transfers.member - 3)  # in a holder of two members

    def routed(self, task) -> Routed:
        """Ragged, and nothing at all for some holders: a function of rank, layer and microbatch. There is more than is sent."""
        draw = random.Random(hash((self.transfers.member, task.layer, task.microbatch)))
        sizes, index = TransferSizes([], []), []
        for holder in PLACEMENT.holders_of(task.layer):
            experts = range(len(PLACEMENT.held(task.layer, holder)))
            tokens = draw.choice([0, 0, 1, 4])
            goes = [set(draw.sample(experts, draw.randint(1, len(experts)))) for _ in range(tokens)]
            of_experts = [[row for row in range(tokens) if expert in goes[row]] for expert in experts]
            sizes.rows.append(tokens)
            sizes.counts.append(list(map(len, of_experts)))
            index += sum(of_experts, [])
        rows = sum(sizes.rows) + 2
        start = 1000 * self.transfers.member + 100 * task.layer + 10 * task.microbatch
        tokens = (start + torch.arange(rows * HIDDEN, dtype=torch.float32)).view(rows, HIDDEN)
        tokens[-2:] = torch.nan
        probs = torch.arange(len(index) + 1, dtype=torch.float64)
        return Routed(sizes, tokens, probs, labels_of(torch.tensor([*index, 77], dtype=torch.int32), probs))

    def attention(self, task) -> None:
        if self.delay:
            time.sleep(self.delay.random() * 0.003)
        owned = self.transfers.owned
        if task.direction is Pass.FORWARD:
            if task.layer > 1:
                made, before = self.routed_before(task), owned[task.layer - 1, task.microbatch]
                rows, of_copies = made.tokens[:-2], rows_of_copies(made)
                doubled = 2 * rows[of_copies] + made.probs[:-1, None].float()
                assert torch.equal(before.outputs, torch.zeros_like(rows).index_add_(0, of_copies, doubled))
                self.checked += 1
            if task.layer <= LAYERS:
                made = self.routed(task)
                self.transfers.route(task, lambda: made.sizes, made.tokens, made.probs, made.labels)
            return
        if task.layer <= LAYERS:
            routed = owned.pop((task.layer, task.microbatch))
            made = self.routed(task)
            rows, of_copies = made.tokens[:-2], rows_of_copies(made)
            assert torch.equal(routed.token_grads[:-2], 3 * rows * of_copies.bincount(minlength=len(rows))[:, None])
            assert torch.equal(routed.prob_grads[:-1], rows[of_copies].sum(dim=1).double())
            assert not routed.token_grads[-2:].any() and not routed.prob_grads[-1:].any()
            self.checked += 1
        if task.layer > 1:
            made = self.routed_before(task)
            owned[task.layer - 1, task.microbatch].output_grads = made.tokens[:-2].clone()

    def routed_before(self, task) -> Routed:
        return self.routed(type(task)(task.kind, task.direction, task.layer - 1, task.microbatch))

    def experts(self, task) -> None:
        if self.delay:
            time.sleep(self.delay.random() * 0.003)
        held = self.transfers.held[task.layer, task.microbatch]
        counts = [of_owner for sizes in held.sharers for of_owner in sizes.counts]
        if task.direction is Pass.FORWARD:
            probs = by_expert(self.of_all(held, held.probs, "copies"), counts, ORDER[len(counts[0])])
            made = 2 * held.copies.expanded(self.of_all(held, held.tokens, "rows")) + probs.float()[:, None]
            held.outputs = self.own(held, held.copies.summed(made), "rows")
        else:
            grads = held.copies.expanded(self.of_all(held, held.output_grads, "rows"))
            held.token_grads = self.own(held, held.copies.summed(3 * grads), "rows")
            prob_grads = torch.empty(len(grads), dtype=torch.float64)
            prob_grads[by_expert(torch.arange(len(grads)), counts, ORDER[len(counts[0])])] = grads.sum(dim=1).double()
            held.prob_grads = self.own(held, prob_grads, "copies")

    def of_all(self, held: Routed, own: torch.Tensor, what: str) -> torch.Tensor:
        """This member's rows or copies among those of all that are the holder, which are 0."""
        sizes = [sum(getattr(of_sharer, what)) for of_sharer in held.sharers]
        return torch.cat([own if place == self.place else own.new_zeros(size, *own.shape[1:])
                          for place, size in enumerate(sizes)])

    def own(self, held: Routed, of_all: torch.Tensor, what: str) -> torch.Tensor:
        return of_all.split([sum(getattr(of_sharer, what)) for of_sharer in held.sharers])[self.place]

    def table(self):
        return {
            **self.transfers.table(),
            **{(Kind.ATTENTION, direction): self.attention for direction in Pass},
            **{(Kind.EXPERT, direction): self.experts for direction in Pass},
        }


def run_schedule(rank: int, world: int, wave: int | None, seed: int | None):
    """Runs the fake model; returns what was checked and each stream's observed order."""
    schedule = zebra(LAYERS, PLACEMENT, ATTENTION, MICROBATCHES, wave)
    member = schedule.member(min(rank, 3))
    model = FakeModel(transfers_of(rank, world), None if seed is None else random.Random(seed * world + rank))
    seen: dict[Stream, list] = {stream: [] for stream in member.streams}
    streams = HostStreams(lambda stream, task, start, end, queued: seen[stream].append(task))
    executor.run(member, model.table(), streams, preparations=model.transfers.preparations())
    assert {stream: tuple(tasks) for stream, tasks in seen.items()} == member.streams
    assert not model.transfers.held
    return model.checked


@pytest.mark.parametrize(
    "world, wave, seed", [(4, None, None), (4, 2, None), (4, None, 1), (4, 3, 2), (4, 1, 3), (5, None, 4), (5, 2, 5)]
)
def test_everything_arrives_whatever_the_delays(world, wave, seed):
    """Every row goes out, is computed on and comes back to its place, forward and backward, in the given order."""
    checked = run_function(run_schedule, world, wave, seed)
    per_attention_rank = LAYERS * MICROBATCHES * 2
    assert checked == [per_attention_rank] * ATTENTION + [0] * (world - ATTENTION)


def disagree(rank: int, world: int, what: str):
    """One owner sends something else than the holders expect."""
    transfers = transfers_of(
        rank, world, dtype=torch.float64 if what == "dtype" and rank == 0 else torch.float32,
        hidden=HIDDEN + 1 if what == "width" and rank == 0 else HIDDEN,
    )
    task = zebra(LAYERS, PLACEMENT, ATTENTION, 1, None).member(0).streams[Stream.OUT][0]
    if rank < ATTENTION:
        rows = 3 if what == "rows" and rank == 0 else 4
        tokens = torch.ones(rows, transfers.hidden, dtype=transfers.dtype)
        sizes = TransferSizes([1, 1, 2], [[1], [1], [1, 1]])
        probs = torch.ones(4)
        labels = labels_of(torch.tensor([0, 0, 0, 1], dtype=torch.int32), probs)
        transfers.route(task, lambda: sizes, tokens, probs, labels)
    for table in (transfers.preparations(), transfers.table()):
        table[task.kind, task.direction](task)


@pytest.mark.parametrize(
    "what, said",
    [("dtype", "member 0 sends layer 1 of its stage, microbatch 1, 4 wide torch.float64"),
     ("width", "member 0 sends layer 1 of its stage, microbatch 1, 5 wide"),
     ("rows", "member 0 has 3 rows of torch.float32 as tokens for DF_1,1, its peers await 4")],
)
def test_both_ends_check_size_and_type(what, said):
    with pytest.raises(RanksFailed) as caught:
        run_function(disagree, 4, what)
    assert said in str(caught.value)


def test_a_damaged_header_is_said_in_words():
    assert _in_words([1, 0, 8, 99, -1, 4, 4]) == \
        "layer 1 of its stage, microbatch 1, 8 wide type 99 with probabilities in type -1"


def test_a_failing_task_stops_the_run_and_is_named():
    """The other streams start nothing more; what was raised comes out, with the task."""
    schedule = zebra(1, Placement(((1,),), 2), 1, 3, None).member(0)
    ran = []

    def attention(task):
        ran.append(task)
        if task.microbatch == 1:
            raise ValueError("no such token")

    table = dict.fromkeys([(kind, direction) for kind in Kind for direction in Pass], ran.append)
    table[Kind.ATTENTION, Pass.FORWARD] = attention
    with pytest.raises(ValueError, match="no such token") as caught:
        executor.run(schedule, table, HostStreams())
    assert caught.value.__notes__ == ["in task AF_1,2 on stream compute"]
    assert not any(task.microbatch == 2 for task in ran)


def test_a_failing_transfer_stops_compute():
    schedule = zebra(1, Placement(((1,),), 2), 1, 1, None).member(0)

    def lost(task):
        raise ConnectionError("peer is gone")

    table = dict.fromkeys([(kind, direction) for kind in Kind for direction in Pass], lambda task: None)
    table[Kind.DISPATCH, Pass.FORWARD] = lost
    with pytest.raises(ConnectionError) as caught:
        executor.run(schedule, table, HostStreams())
    assert caught.value.__notes__ == ["in task DF_1,1 on stream out"]


def test_torch_has_what_leaves_room_for_transfers():
    """Private to torch, so a version may lack it: then grouped products take twice as long beside a transfer."""
    assert torch._C._get_sm_carveout_experimental() is None
    assert callable(torch._C._set_sm_carveout_experimental)


@pytest.mark.parametrize("said, found", [("1", 1), ("4", 4), ("", 2), ("0", 2), ("many", 2)])
def test_blocks_of_a_channel(monkeypatch, said, found):
    monkeypatch.setenv("NCCL_MAX_CTAS", said)
    assert blocks() == found


def test_a_failing_preparation_stops_the_run():
    schedule = zebra(1, Placement(((1,),), 2), 1, 3, None).member(0)
    ran = []

    def refuse(task):
        if task.microbatch == 1:
            raise ConnectionError("no sizes")

    table = dict.fromkeys([(kind, direction) for kind in Kind for direction in Pass], ran.append)
    with pytest.raises(ConnectionError) as caught:
        executor.run(schedule, table, HostStreams(), preparations={(Kind.DISPATCH, Pass.FORWARD): refuse})
    assert caught.value.__notes__ == ["in task DF_1,2 on stream out"]
    assert not any(task.microbatch for task in ran if (task.kind, task.direction) == (Kind.DISPATCH, Pass.FORWARD))


def test_what_is_prepared_is_ahead_of_its_turn():
    """Sizes of later microbatches cross while tokens of an earlier one do, in order."""
    schedule = zebra(1, Placement(((1,),), 2), 1, 3, None, forward_only=True).member(0)
    prepared, last = [], threading.Event()

    def prepare(task):
        prepared.append(task.microbatch)
        if task.microbatch == 2:
            last.set()

    def dispatch(task):
        assert last.wait(10), "the first dispatch kept the others from being prepared"

    table = dict.fromkeys([(kind, direction) for kind in Kind for direction in Pass], lambda task: None)
    key = Kind.DISPATCH, Pass.FORWARD
    executor.run(schedule, {**table, key: dispatch}, HostStreams(), preparations={key: prepare})
    assert prepared == [0, 1, 2]


def test_streams_run_beside_each_other():
    """A transfer of one microbatch is under way while the next one computes."""
    schedule = zebra(1, Placement(((1,),), 2), 1, 2, None, forward_only=True).member(0)
    second_attention = threading.Event()

    def attention(task):
        if (task.layer, task.microbatch) == (1, 1):
            second_attention.set()

    def dispatch(task):
        assert second_attention.wait(10), "the first dispatch kept the second microbatch from computing"

    table = dict.fromkeys([(kind, direction) for kind in Kind for direction in Pass], lambda task: None)
    table[Kind.ATTENTION, Pass.FORWARD], table[Kind.DISPATCH, Pass.FORWARD] = attention, dispatch
    executor.run(schedule, table, HostStreams())
