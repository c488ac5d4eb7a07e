"""What a log interval says beside Megatron's line: tokens a second against the prediction, and what tracing measures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from megatron.training import get_args
from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

from megatron_hetermoe.config.step import Prediction
from megatron_hetermoe.mcore.session import Session
from megatron_hetermoe.runtime.recorder import Recorder
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task
from megatron_hetermoe.schedule.trace import STEP, Span
from megatron_hetermoe.topology.layout import ATTENTION, EXPERT

_ROLES = (ATTENTION, EXPERT)
_CHANNELS = (Stream.OUT.value, Stream.BACK.value)
_SENT = (*_CHANNELS, Stream.STAGES.value)


class Meter:
    """Measures training steps on one rank; all ranks of both pools have one and call it together.

    A step is from the first task to the end of the optimizer step, so evaluation and checkpoints do not count.
    Without a recorder nothing is measured but the step's time.

    Args:
        session: this rank's.
        recorder: told of the same steps.
    """

    def __init__(self, session: Session, recorder: Recorder | None):
        self.recorder = recorder
        self._session = session
        self._clear()

    def _clear(self) -> None:
        self._steps, self._seconds, self._tokens = 0, 0.0, 0
        # Of this rank: seconds of A and E tasks, seconds after the last one, bytes sent by channel; tokens by layer
        # and expert.
        self._work, self._after = 0.0, 0.0
        self._sent = dict.fromkeys(_SENT, 0)
        self._load = [[0] * len(holders) for holders in self._session.plan.placement]

    def begin_step(self, microbatches: int) -> None:
        """Before a training step's first task, with the microbatches of each attention rank."""
        self._start, self._microbatches = time.perf_counter(), microbatches
        if self.recorder:
            self.recorder.begin_step()

    def reduction(self) -> AbstractContextManager[None]:
        """What the reduction of gradients runs in."""
        return self.recorder.reduction() if self.recorder else nullcontext()

    def optimizer(self) -> AbstractContextManager[None]:
        """What the optimizer step runs in."""
        return self.recorder.optimizer() if self.recorder else nullcontext()

    def end_step(self) -> None:
        """After the optimizer step; says how the log interval went where it ends."""
        args = get_args()
        self._steps += 1
        self._seconds += time.perf_counter() - self._start
        self._tokens += self._microbatches * args.micro_batch_size * args.seq_length * self._session.layout.microbatches
        if self.recorder:
            self._add(self.recorder.end_step())
        iteration = args.curr_iteration + 1  # Megatron counts a step when it has returned
        if iteration % args.log_interval == 0:
            self._report(iteration)
            self._clear()

    def _add(self, spans: Sequence[Span]) -> None:
        for span in spans:
            if span.stream == STEP:
                self._after += span.end - span.start
            elif span.stream == Stream.COMPUTE.value:
                self._work += span.end - span.start
            else:
                self._sent[span.stream] += span.sent
                task = Task.parse(span.task)
                if task.kind is Kind.DISPATCH and task.direction is Pass.FORWARD:
                    held = self._session.held(task.layer)
                    for expert, tokens in zip(held, span.tokens):
                        self._load[task.layer - 1][expert] += tokens

    def _report(self, iteration: int) -> None:
        scalars = {"tokens-per-second": self._tokens / self._seconds}
        if self.recorder:
            scalars |= self._over_ranks()
        if self._session.rank != self._session.layout.world_size - 1:
            return  # Megatron's own log is the last rank's too
        print(f" hetermoe: {said(scalars, self._session.plan.predicted)}", flush=True)
        writer, wandb = get_tensorboard_writer(), get_wandb_writer()
        if writer:
            for name, value in scalars.items():
                writer.add_scalar(f"hetermoe/{name}", value, iteration)
        if wandb:
            wandb.log({f"hetermoe/{name}": value for name, value in scalars.items()}, iteration)

    def _over_ranks(self) -> dict[str, float]:
        """The measurements of all ranks since the last interval, in one sum on the control group."""
        mine = []
        for role in _ROLES:
            shares = (self._work / self._seconds, self._after / self._seconds)
            mine += shares if role == self._session.role else (0.0, 0.0)
        flat = [tokens for layer in self._load for tokens in layer]
        sums = torch.tensor([*mine, *self._sent.values(), *flat], dtype=torch.float64)
        dist.all_reduce(sums, group=self._session.control)
        values = sums.tolist()
        scalars = {}
        for index, role in enumerate(_ROLES):
            busy, after = (value / len(self._session.layout.pool(role)) for value in values[2 * index:2 * index + 2])
            scalars[f"{role}-busy"] = busy
            scalars[f"{role}-bubble"] = max(0.0, 1 - busy - after)
        sent = dict(zip(_SENT, values[4:7]))
        for name in _SENT if self._session.layout.stages > 1 else _CHANNELS:
            scalars[f"{name}-bytes-per-second"] = sent[name] / self._seconds
        return scalars | self._balance(values[7:])

    def _balance(self, tokens: Sequence[float]) -> dict[str, float]:
        """How uneven experts' tokens are, as the most over the mean: of the experts of a layer, the worst layer's;
        and of the holders, over all layers."""
        worst, holders, at = 1.0, {}, 0
        for layer in self._session.plan.placement:
            counts = tokens[at:at + len(layer)]
            at += len(layer)
            if sum(counts):
                worst = max(worst, max(counts) * len(counts) / sum(counts))
            for holder, count in zip(layer, counts):
                holders[holder] = holders.get(holder, 0.0) + count
        most = max(holders.values(), default=0.0) * len(holders)
        return {"expert-load-most-over-mean": worst,
                "holder-load-most-over-mean": most / (sum(holders.values()) or 1.0)}


def said(scalars: dict[str, float], predicted: Prediction | None) -> str:
    """A log interval in one line: what was reached beside what was predicted, and what was measured."""
    rate = scalars["tokens-per-second"]
    parts = [f"{rate:,.0f} tokens/s"]
    if predicted:
        parts.append(f"{rate / predicted.tokens_per_second:.2f} of the plan's {predicted.tokens_per_second:,.0f}")
        if alone := predicted.attention_alone:
            parts.append(f"{rate / alone:.2f} of {alone:,.0f} predicted for the attention GPUs alone")
    for role in _ROLES:
        if f"{role}-busy" in scalars:
            parts.append(f"{role} ranks compute {scalars[f'{role}-busy']:.0%}, idle {scalars[f'{role}-bubble']:.0%}")
    if "out-bytes-per-second" in scalars:
        parts.append(", ".join(f"{name} {scalars[f'{name}-bytes-per-second'] / 1e6:,.1f} MB/s" for name in _SENT
                               if f"{name}-bytes-per-second" in scalars))
        parts.append(f"busiest expert {scalars['expert-load-most-over-mean']:.2f} times its layer's mean")
    return " | ".join(parts)
