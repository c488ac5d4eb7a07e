"""The transfers of an asymmetric mixture-of-experts layer, as tasks outside autograd.

Traffic is bipartite and ragged: every attention rank sends to every holder of a layer what its router decided, and
any of it may be nothing. A token is sent to a holder once, as a row, with the rows' numbers for each of the holder's experts;
the holder makes copies and returns their sum. An attention rank knows all sizes; a holder learns them from a header that
travels in front of the tokens. Nothing else is ever awaited in order to know a size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch

from megatron_hetermoe.runtime.channels import Channel, Message
from megatron_hetermoe.runtime.copies import Copies, by_expert, empty_labels, from_labels
from megatron_hetermoe.runtime.device import is_gpu
from megatron_hetermoe.runtime.recorder import Recorder
from megatron_hetermoe.runtime.selfcheck import Checksums
from megatron_hetermoe.schedule.tasks import Kind, Pass, Task
from megatron_hetermoe.topology.placement import Placement

# Parts of a transfer.
_HEADER, _TOKENS, _LABELS, _PROBS = range(4)
PARTS = ("header", "tokens", "labels of copies", "gradients of probabilities")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HEADER_FIELDS = 5  # layer, microbatch, hidden, dtype of tokens, dtype of probabilities; then the number of rows, then counts


class TransferSizes(NamedTuple):
    """What goes between a member and each of its peers in one layer: an owner's peers are the layer's holders, a holder's the
    attention members that send to it, both ascending.

    Attributes:
        rows: tokens, each of which goes to some of the holder's experts.
        counts: for each of the holder's experts, how many of them go to it; so their sum is the number of copies.
    """

    rows: list[int]
    counts: list[list[int]]

    @property
    def copies(self) -> list[int]:
        """A token's with each peer, one for each expert that it goes to."""
        return [sum(of_peer) for of_peer in self.counts]


SizesLater = Callable[[], TransferSizes]


@dataclass
class Routed:
    """One layer of one microbatch, at one of its two ends.

    At the tokens' owner, rows are sorted by holder, and copies by holder, then by the holder's local expert
    (``Placement.expert_order``); at a holder, rows by owner, and copies by owner, then by local expert. What an owner has
    may be longer than what is sent: sizes are known on its device only when it is made. Fields are None before they are
    known and after they were last read.

    Attributes:
        sizes: with each peer.
        tokens: [rows, hidden].
        probs: [copies], in the router's precision.
        labels: at the owner, [copies, words], the row with the holder that each is a copy of, and its probability
            (``runtime.copies.labels_of``).
        outputs: [rows, hidden], for each token the sum of what the holder's experts made of it.
        output_grads, token_grads: [rows, hidden].
        prob_grads: [copies].
        sharers: at a holder that is several members, ``sizes`` of each of them, in their order; elsewhere of this
            one alone, which need not be given.
        copies: at a holder, of the rows of all sharers, one sharer's after the other's, in the order in which experts take
            them.
    """

    sizes: TransferSizes
    tokens: torch.Tensor | None
    probs: torch.Tensor | None
    labels: torch.Tensor | None = None
    outputs: torch.Tensor | None = None
    output_grads: torch.Tensor | None = None
    token_grads: torch.Tensor | None = None
    prob_grads: torch.Tensor | None = None
    sharers: tuple[TransferSizes, ...] = ()
    copies: Copies | None = None

    def __post_init__(self) -> None:
        self.sharers = self.sharers or (self.sizes,)
        self.rows = sum(self.sizes.rows)
        self.made_rows, self.made_probs = len(self.tokens), len(self.probs)
        self.probs_dtype = self.probs.dtype


@dataclass
class Transfers:
    """The D and C tasks of one member.

    Attributes:
        placement: who holds which expert.
        attention_members: M.
        member: this rank.
        out, back: the channels.
        hidden: width of a token.
        dtype: of tokens, on both ends.
        device: where buffers are.
        holders: for each holder, the members that are it together; not given where each member is one. An owner's rows
            go to one of them, so that each token crosses between the pools once, and its number in the holder is the
            owner's modulo their number; all of them learn of all rows and copies.
        checksums: told of every message of a step that is checked.
        owned, held: state by (layer, microbatch), for the A and E tasks to read and fill.
        recorder: told what is sent and for which experts, where the step is recorded.
        row_order: gives, for a layer, the order in which this member's experts take their copies, as numbers of local experts;
            ascending where not given.
    """

    placement: Placement
    attention_members: int
    member: int
    out: Channel
    back: Channel
    hidden: int
    dtype: torch.dtype
    device: torch.device
    holders: tuple[tuple[int, ...], ...] = ()
    checksums: Checksums | None = None
    owned: dict[tuple[int, int], Routed] = field(default_factory=dict)
    held: dict[tuple[int, int], Routed] = field(default_factory=dict)
    recorder: Recorder | None = None
    row_order: Callable[[int], Sequence[int]] | None = None

    def __post_init__(self) -> None:
        self.holders = self.holders or tuple((member,) for member in range(self.placement.members))
        self._holder, self._sharers = next(
            (holder, members) for holder, members in enumerate(self.holders) if self.member in members
        )
        sharers = len(self._sharers)
        owners = [range(place, self.attention_members, sharers) for place in range(sharers)]  # whose rows each one gets
        self._owners = owners[self._sharers.index(self.member)]
        self._all_owners = [owner for of_sharer in owners for owner in of_sharer]
        self._announced: dict[tuple[int, int], tuple[tuple[TransferSizes, ...], torch.dtype]] = {}
        self._leaving: dict[tuple[int, int], tuple[SizesLater, torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        # Buffers are made on a channel's stream and freed by compute, which the allocator must know.
        self._compute = torch.cuda.current_stream() if is_gpu(self.device) else None

    def table(self) -> dict[tuple[Kind, Pass], Callable[[Task], None]]:
        """What the executor calls for D and C tasks."""
        return {
            (Kind.DISPATCH, Pass.FORWARD): self._dispatch,
            (Kind.COMBINE, Pass.FORWARD): self._combine,
            (Kind.COMBINE, Pass.BACKWARD): self._combine_backward,
            (Kind.DISPATCH, Pass.BACKWARD): self._dispatch_backward,
        }

    def preparations(self) -> dict[tuple[Kind, Pass], Callable[[Task], None]]:
        """What the executor calls ahead of them: sizes cross while tokens of earlier tasks do."""
        return {(Kind.DISPATCH, Pass.FORWARD): self._announce}

    def route(
        self, task: Task, sizes: SizesLater, tokens: torch.Tensor, probs: torch.Tensor, labels: torch.Tensor
    ) -> None:
        """Hands over what an A task routed, for the D task that follows.

        Args:
            task: the A task.
            sizes: gives ``Routed.sizes``; asked by the D task's preparation, on its thread, so that compute need not
                wait for the device to know them.
            tokens: [at least rows, hidden], freed when they are sent.
            probs: [at least copies]; in the labels too, and not read.
            labels: [at least copies, words], as ``Routed.labels``.
        """
        self._leaving[task.layer, task.microbatch] = sizes, tokens, probs, labels

    @property
    def _owns(self) -> bool:
        return self.member < self.attention_members

    def _holds(self, layer: int) -> bool:
        return bool(self.placement.held(layer, self._holder))

    def _announce(self, task: Task) -> None:
        """Headers of a D forward: to the holders, and at a holder those for it."""
        headers: list[Message] = []
        if self._owns:
            sizes, *made = self._leaving.pop((task.layer, task.microbatch))
            state = self.owned[task.layer, task.microbatch] = Routed(sizes(), *made)
            headers = [
                Message(member, _HEADER, header)
                for holder, *of_holder in zip(self.placement.holders_of(task.layer), *state.sizes)
                for header in (self._header(task, state, *of_holder),) for member in self.holders[holder]
            ]
        if self._holds(task.layer):
            self._announced[task.layer, task.microbatch] = self._receive_headers(task, headers)
        else:
            self._exchange(task, self.out, headers)

    @torch.no_grad()
    def _dispatch(self, task: Task) -> None:
        """D forward, on channel out: tokens and labels of copies to the holders, which know how many."""
        state = self._owner(task) if self._owns else None
        payload = self._leaves(task, state) if state else []
        if not self._holds(task.layer):
            self._exchange(task, self.out, payload)
        else:
            received = self._receive(task, payload, *self._announced.pop((task.layer, task.microbatch)))
            if self.recorder is not None:
                experts = range(len(self.placement.held(task.layer, self._holder)))
                self.recorder.routed(task, [sum(counts[expert] for counts in received.sizes.counts) for expert in experts])
            self.held[task.layer, task.microbatch] = received
        if state:
            # Only their shape is read from here on, by the backward of the task that made them.
            state.tokens.untyped_storage().resize_(0)
            state.tokens = state.probs = None

    def _leaves(self, task: Task, state: Routed) -> list[Message]:
        """What an owner sends in D forward."""
        copies = state.sizes.copies
        tokens, labels = state.tokens[:state.rows], state.labels[:sum(copies)]
        self._check(task, "tokens", tokens, state.rows)
        _used_here(labels)
        return self._parts(task, state, _TOKENS, tokens) + [
            Message(member, _LABELS, of_holder)
            for holder, of_holder in zip(self.placement.holders_of(task.layer), labels.split(copies))
            for member in self.holders[holder]
        ]

    def _receive(
        self, task: Task, payload: list[Message], sharers: tuple[TransferSizes, ...], probs_dtype: torch.dtype
    ) -> Routed:
        """Sends this member's payload, receives those for it, and learns which row each copy is of."""
        rows, counts = ([one for of_sharer in sharers for one in of_sharer[field]] for field in range(2))
        place = self._sharers.index(self.member)
        sizes, copies = sharers[place], [sum(of_sharer.copies) for of_sharer in sharers]
        tokens = self._empty(sum(sizes.rows))
        labels = empty_labels(sum(copies), probs_dtype, self.device)
        buffers = [Message(owner, _TOKENS, part) for owner, part in zip(self._owners, tokens.split(sizes.rows))]
        of_owners = labels.split([sum(of_owner) for of_owner in counts])
        buffers += [Message(owner, _LABELS, part) for owner, part in zip(self._all_owners, of_owners)]
        self._exchange(task, self.out, payload, buffers)
        index, probs = from_labels(labels, probs_dtype)
        # Each owner counts its rows from 0 on.
        torch._foreach_add_(index.split(list(map(len, of_owners))), list(accumulate(rows, initial=0))[:-1])
        order = self.row_order(task.layer) if self.row_order else range(len(counts[0]))
        made = Copies.of(by_expert(index, counts, order), sum(rows))
        for tensor in (probs, *vars(made).values()):
            self._for_compute(tensor)
        return Routed(sizes, tokens, probs.split(copies)[place], sharers=sharers, copies=made)

    @torch.no_grad()
    def _combine(self, task: Task) -> None:
        """C forward, on channel back: the experts' outputs to the tokens' owners."""
        state = self._owner(task) if self._owns else None
        buffers = []
        if state:
            state.outputs = self._empty(state.rows)
            buffers = self._parts(task, state, _TOKENS, state.outputs)
        self._exchange(task, self.back, self._returned(task, _TOKENS, "outputs"), buffers)
        if self._holds(task.layer):
            held = self.held[task.layer, task.microbatch]
            held.outputs.untyped_storage().resize_(0)
            held.outputs = None

    @torch.no_grad()
    def _combine_backward(self, task: Task) -> None:
        """C backward, on channel out: the outputs' gradients to the holders."""
        sends, buffers = [], []
        state = self._owner(task) if self._owns else None
        if state:
            self._check(task, "gradients of outputs", state.output_grads, state.rows)
            sends = self._parts(task, state, _TOKENS, state.output_grads.contiguous())
        if self._holds(task.layer):
            held = self.held[task.layer, task.microbatch]
            held.output_grads = self._empty(held.rows)
            buffers = [
                Message(owner, _TOKENS, rows)
                for owner, rows in zip(self._owners, held.output_grads.split(held.sizes.rows))
            ]
        self._exchange(task, self.out, sends, buffers)
        if state:
            state.output_grads = None

    @torch.no_grad()
    def _dispatch_backward(self, task: Task) -> None:
        """D backward, on channel back: gradients of tokens and probabilities to the owners."""
        buffers = []
        if self._owns:
            state = self._owner(task)
            copies = sum(state.sizes.copies)
            state.token_grads = self._empty(state.made_rows)
            state.prob_grads = self._empty(state.made_probs, state.probs_dtype)
            for grads, used in ((state.token_grads, state.rows), (state.prob_grads, copies)):
                if len(grads) > used:
                    grads[used:].zero_()  # of what was not sent
            buffers = self._parts(task, state, _TOKENS, state.token_grads[:state.rows])
            buffers += self._parts(task, state, _PROBS, state.prob_grads[:copies])
        sends = self._returned(task, _TOKENS, "token_grads") + self._returned(task, _PROBS, "prob_grads")
        self._exchange(task, self.back, sends, buffers)
        self.held.pop((task.layer, task.microbatch), None)

    def _exchange(
        self, task: Task, channel: Channel, sends: Sequence[Message], receives: Sequence[Message] = ()
    ) -> None:
        if self.checksums is not None:
            self.checksums.sending(task, sends)
        sent = channel.exchange(sends, receives)
        if self.recorder is not None:
            self.recorder.sent(task, sent)
        if self.checksums is not None:
            self.checksums.received(task, receives)

    def _owner(self, task: Task) -> Routed:
        return self.owned[task.layer, task.microbatch]

    def _parts(self, task: Task, state: Routed, part: int, tensor: torch.Tensor) -> list[Message]:
        """An owner's tensor, in the pieces that go to or come from each holder."""
        _used_here(tensor)
        return [
            Message(self._receiver(holder), part, rows)
            for holder, rows in zip(self.placement.holders_of(task.layer), tensor.split(_sizes(state, part)))
        ]

    def _receiver(self, holder: int) -> int:
        """The member of a holder that this owner's rows go to."""
        members = self.holders[holder]
        return members[self.member % len(members)]

    def _returned(self, task: Task, part: int, name: str) -> list[Message]:
        """A holder's results, in the pieces that go to each owner; none where this member holds nothing."""
        if not self._holds(task.layer):
            return []
        held = self.held[task.layer, task.microbatch]
        tensor = getattr(held, name)
        sizes = _sizes(held, part)
        self._check(task, name, tensor, sum(sizes), self.dtype if part == _TOKENS else held.probs_dtype)
        _used_here(tensor)
        return [Message(owner, part, rows) for owner, rows in zip(self._owners, tensor.contiguous().split(sizes))]

    def _empty(self, rows: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A buffer, [rows, hidden] of tokens or, with the dtype of probabilities, [rows]."""
        shape = (rows,) if dtype else (rows, self.hidden)
        return self._for_compute(torch.empty(shape, dtype=dtype or self.dtype, device=self.device))

    def _for_compute(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, made on a channel's stream, whose memory is kept until compute is past what it does when it lets go."""
        if tensor.is_cuda and tensor.numel():
            tensor.record_stream(self._compute)
        return tensor

    def _header(self, task: Task, state: Routed, rows: int, counts: list[int]) -> torch.Tensor:
        """What a holder must know before it can receive, as int64 on the CPU."""
        return torch.tensor(
            [task.layer, task.microbatch, self.hidden, _DTYPES.index(state.tokens.dtype),
             _DTYPES.index(state.probs.dtype), rows, *counts]
        )

    def _receive_headers(self, task: Task, own_headers: list[Message]) -> tuple[tuple[TransferSizes, ...], torch.dtype]:
        """Sends this member's headers, receives those for it and checks them.

        Returns:
            the sizes of what each of the members that are this holder gets, and the type of probabilities.
        """
        local = len(self.placement.held(task.layer, self._holder))
        headers = [torch.empty(_HEADER_FIELDS + 1 + local, dtype=torch.int64) for _ in range(self.attention_members)]
        buffers = [Message(owner, _HEADER, header) for owner, header in enumerate(headers)]
        self._exchange(task, self.out, own_headers, buffers)
        expected = [task.layer, task.microbatch, self.hidden, _DTYPES.index(self.dtype)]
        probs_dtype = headers[0][_HEADER_FIELDS - 1].item()
        for owner, header in enumerate(headers):
            announced = header.tolist()
            if announced[:_HEADER_FIELDS] != [*expected, probs_dtype]:
                raise RuntimeError(
                    f"member {self.member} awaits {_in_words([*expected, probs_dtype])}, but member {owner} sends "
                    f"{_in_words(announced)}"
                )
        rows, counts = zip(*((number, of) for number, *of in (header[_HEADER_FIELDS:].tolist() for header in headers)))
        places = range(len(self._sharers))
        sharers = tuple(TransferSizes(*(list(each[place::len(places)]) for each in (rows, counts))) for place in places)
        return sharers, _DTYPES[probs_dtype]

    def _check(
        self, task: Task, what: str, tensor: torch.Tensor, rows: int, dtype: torch.dtype | None = None
    ) -> None:
        """The sender's end of what the receiver checks by its header: the size and type that were agreed on."""
        dtype = dtype or self.dtype
        if tensor.shape[0] != rows or tensor.dtype != dtype:
            raise RuntimeError(
                f"member {self.member} has {tensor.shape[0]} rows of {tensor.dtype} as {what} for {task}, "
                f"its peers await {rows} of {dtype}"
            )


def _in_words(header: Sequence[int]) -> str:
    """A header, for a message; also one that was damaged on its way."""
    layer, microbatch, hidden, *dtypes = header[:_HEADER_FIELDS]
    tokens, probs = (str(_DTYPES[dtype]) if dtype in range(len(_DTYPES)) else f"type {dtype}" for dtype in dtypes)
    return f"layer {layer} of its stage, microbatch {microbatch + 1}, {hidden} wide {tokens} with probabilities in {probs}"


def _sizes(state: Routed, part: int) -> list[int]:
    """How a part is divided among peers."""
    return state.sizes.rows if part == _TOKENS else state.sizes.copies


def _used_here(tensor: torch.Tensor) -> None:
    """Keeps a tensor's memory, when its owner lets go of it, until this thread's stream is past what it does now."""
    if tensor.is_cuda and tensor.numel():
        tensor.record_stream(torch.cuda.current_stream())
