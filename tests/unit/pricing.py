"""Small models, clusters and costs for the tests of cost, simulator and planner."""

from __future__ import annotations

from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.config.shape import ModelShape
from megatron_hetermoe.config.step import Step
from megatron_hetermoe.cost.cluster import Cluster, ClusterPool, Link
from megatron_hetermoe.cost.curves import Notes
from megatron_hetermoe.cost.profile import Profile, Profiled, taken_for
from megatron_hetermoe.cost.group import GroupCosts, seats_of
from megatron_hetermoe.cost.tasks import TaskCosts
from megatron_hetermoe.schedule.interleaved import schedule_of
from megatron_hetermoe.simulator.baselines import spread

PRECISION = "bf16"


def shape(layers=3, experts=8, moe_layers=None, hidden=64, sequence=128, topk=2):
    """A small mixture-of-experts model."""
    return ModelShape(
        layers=layers, moe_layers=tuple(range(1, layers + 1)) if moe_layers is None else moe_layers, experts=experts,
        topk=topk, hidden=hidden, expert_ffn=2 * hidden, dense_ffn=2 * hidden, shared_expert_ffn=0, gated=True, heads=4,
        query_groups=2, head_dim=16, tied_embeddings=False, sequence=sequence,
    )


def profile(
    of, attention=(1e-3, 2e-3), expert=(1e-4, 2e-4), kind="test", head=None, optimizer=None, memory=None, expert_task=None,
    host=None
):
    """A profile in which attention takes that long for the shape's sequence, an expert for 64 tokens, an E task beside its
    experts, and the host to queue them."""
    size, parts = of.sequence, {}
    parts["attention"] = {size / 2: tuple(x / 2 for x in attention), size * 2: tuple(2 * x for x in attention)}
    parts["expert"] = {1.0: tuple(x / 64 for x in expert), 4096.0: tuple(64 * x for x in expert)}
    if head:
        parts["head"] = {size / 2: tuple(x / 2 for x in head), size * 2: tuple(2 * x for x in head)}
    return Profile(kind, taken_for(of, PRECISION), parts, optimizer, memory, expert_task, host)


def pool(name, gpus_per_node=2, nodes=2, memory=40e9, bandwidth=1e9, latency=1e-5, kind="V100-SXM2", channel_host=()):
    """A pool whose links all have one bandwidth a rank."""
    return ClusterPool(name, kind, nodes, gpus_per_node, memory, Link(bandwidth, latency),
                       Link(bandwidth * gpus_per_node, latency), channel_host=channel_host)


def cluster(new=4, old=4, **settings):
    """Two pools, "new" and "old", one node each."""
    return Cluster({"new": pool("new", new, 1, **settings), "old": pool("old", old, 1, **settings)})


def group(m=2, n=2, of=None, microbatches=4, new=None, old=None, on=None, groups=1, micro_batch=1):
    """The costs of a ZP group of m "new" and n "old" ranks, with profiles for each."""
    of = of or shape()
    on = on or cluster(m, n)
    profiles = {"new": new or profile(of), "old": old or profile(of)}
    kinds = {name: Profiled(profiles[name], of, PRECISION, Notes()) for name in profiles}
    seats = seats_of(["new"] * m + ["old"] * n, on, kinds)
    return GroupCosts(of, Step(micro_batch, microbatches, 1000), seats, m, groups, PRECISION)


def of_stages(priced, stage_layers, wave=None, placement=None, virtual=1):
    """Schedules and costs of the pipeline stages that a group's layers are divided into; experts spread over expert ranks
    unless a placement of all layers says otherwise."""
    m, n = priced.attention_members, priced.members - priced.attention_members
    placement = placement or spread(priced, range(m, priced.members))
    stages = len(stage_layers) // virtual
    plan = Plan(priced.shape, m * stages, n * stages, 1, placement.holders, wave=wave,
                stage_layers=tuple(stage_layers) if stages > 1 else (), virtual_stages=virtual)
    return [
        (schedule_of(plan, placement, m, stage, priced.step.microbatches),
         TaskCosts(costs, placement.of_chunks(plan.chunks_of_stage(stage))))
        for stage, costs in enumerate(priced.of_stages(stage_layers, virtual))
    ]
