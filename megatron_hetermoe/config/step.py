"""What one optimizer step does, as far as time and memory depend on it, and what was predicted for it."""

from __future__ import annotations

from dataclasses import dataclass

RECOMPUTE = ("none", "core_attn", "full")


@dataclass(frozen=True)
class Step:
    """A training step of each attention rank.

    Attributes:
        micro_batch: sequences of one microbatch.
        microbatches: those of one attention rank in a step.
        vocabulary: rows of the output layer.
        recompute: what the backward computes again, one of RECOMPUTE: Megatron's selective recomputation of the
            attention core, or all of a layer.
        distributed_optimizer: whether data-parallel ranks share the optimizer's state.
        activation_again: whether the backward computes the output of the experts' activation again: Megatron's
            ``moe_act``, beside other selective recomputation or alone.
        cuda_graphs: whether attention ranks replay what they compute between transfers, which takes memory of its own.
    """

    micro_batch: int
    microbatches: int
    vocabulary: int
    recompute: str = "none"
    distributed_optimizer: bool = False
    activation_again: bool = False
    cuda_graphs: bool = False


@dataclass(frozen=True)
class Prediction:
    """What a plan is expected to do.

    Attributes:
        step_seconds: one step.
        tokens_per_second: of all attention ranks together.
        attention_busy, expert_busy: share of the step in which a pool computes.
        attention_bytes, expert_bytes: memory of a role's fullest rank.
        estimated: a GPU that nobody has profiled was priced from the device table.
        attention_alone: tokens a second of the attention ranks' pools by themselves, with stock expert parallelism;
            None where the model does not fit them.
    """

    step_seconds: float
    tokens_per_second: float
    attention_busy: float
    expert_busy: float
    attention_bytes: float
    expert_bytes: float
    estimated: bool
    attention_alone: float | None = None


@dataclass(frozen=True)
class TaskSeconds:
    """What a task of each kind and pass takes in a pipeline stage, in seconds: the median over layers and over the members that have it.

    Attributes:
        attention_forward, attention_backward: A tasks.
        dispatch_forward, dispatch_backward, combine_forward, combine_backward: D and C tasks, alone on their links, once
            all members have come.
        expert_forward, expert_backward: E tasks of expert ranks.
        moved_forward, moved_backward: E tasks of attention ranks; 0 where they hold no expert.
        handover: H tasks, of either pass; 0 where there is one pipeline stage.
    """

    attention_forward: float
    attention_backward: float
    dispatch_forward: float
    dispatch_backward: float
    combine_forward: float
    combine_backward: float
    expert_forward: float
    expert_backward: float
    moved_forward: float
    moved_backward: float
    handover: float = 0.0
