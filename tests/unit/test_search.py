"""The search over layouts: what fits, what is left out, what to do where nothing fits."""

import re
from dataclasses import replace

import numpy as np
import pytest
from pricing import PRECISION, cluster, group, pool, profile, shape

from megatron_hetermoe.config.plan import plan_from_json
from megatron_hetermoe.config.step import Step
from megatron_hetermoe.cost.cluster import Cluster, kinds_of
from megatron_hetermoe.cost.curves import Notes
from megatron_hetermoe.cost.group import GroupCosts, seats_of
from megatron_hetermoe.cost.tasks import TaskCosts, costs_of_plan
from megatron_hetermoe.planner.advice import alone, baselines, nothing_fits
from megatron_hetermoe.planner.asym_ea import Limits, counts_of, feasible, long_step_seconds, placement_of
from megatron_hetermoe.planner.memory import expert_row_bytes, in_flight, member_memory, usable, waves_ahead
from megatron_hetermoe.planner.options import Question, options
from megatron_hetermoe.planner.search import _by_turns, after_losing_a_node, left_out, search, smaller, with_fewer_nodes
from megatron_hetermoe.planner.staged import divisions
from megatron_hetermoe.schedule.interleaved import chunk_units
from megatron_hetermoe.schedule.orders import build
from megatron_hetermoe.schedule.tasks import Kind, Pass, Task
from megatron_hetermoe.simulator.baselines import expert_parallel_tokens_per_second, spread
from megatron_hetermoe.simulator.events import simulate
from megatron_hetermoe.simulator.fast import step_seconds
from megatron_hetermoe.simulator.planned import predict
from megatron_hetermoe.topology.layout import layout_of, stage_problems

OF = shape(layers=2, experts=4)


def question(of=OF, batch=16):
    return Question(of, PRECISION, 1, batch, 1000, ("none",), (True,))


def kinds(on, of=OF, old=None):
    """"new" as profiled, every other pool like ``old``."""
    slow = old or profile(of, (5e-3, 1e-2), (1.5e-4, 3e-4))
    return kinds_of(on, of, PRECISION, Notes(), {name: profile(of) if name == "new" else slow for name in on.pools})


def test_every_option_divides_the_batch_and_stays_within_the_pools():
    on = cluster(4, 3)
    found = list(options(question(), on, kinds(on)))
    assert found
    for option in found:
        assert 16 % (option.m * option.groups) == 0
        assert option.group.step.microbatches * option.m * option.groups == 16
        assert all(count <= on.pools[name].gpus for name, count in option.used().items())


def test_the_best_is_the_fastest_and_no_faster_than_its_bound():
    on = cluster(4, 4)
    found = search(question(), on, kinds(on))
    speeds = [one.tokens_per_second for one in found.best]
    assert speeds == sorted(speeds, reverse=True)  # none of them is a pipeline
    assert all(one.tokens_per_second <= one.option.bound * (1 + 1e-9) for one in found.best)
    best = found.best[0]
    assert {name for name, _ in best.option.attention} == {"new"}  # attention is five times slower on "old"


def test_options_of_each_sort_are_looked_at():
    """Whatever their bounds are, some of each sort are among the first; and none is lost."""
    on = cluster(4, 4)
    found = sorted(options(question(), on, kinds(on)), key=lambda option: -option.bound)
    first = _by_turns(found)
    assert sorted(map(id, first)) == sorted(map(id, found)) and first[0] is found[0]

    def sort(option):
        return [name for name, _ in option.attention], [name for name, _ in option.expert]

    sorts = {str(sort(option)) for option in found}
    assert len(sorts) > 2 and {str(sort(option)) for option in first[:2 * len(sorts)]} == sorts


def test_the_plan_of_the_best_says_what_the_simulator_says():
    on = cluster(4, 4)
    best = search(question(), on, kinds(on)).best[0]
    plan = plan_from_json(best.plan().to_json(), "plan.json")
    costs = costs_of_plan(plan, on, kinds(on))
    members = plan.attention_ranks // plan.groups
    orders = build(plan.schedule, plan.model.layers, costs.placement, members, plan.step.microbatches, plan.wave)
    assert simulate(orders, costs).seconds == pytest.approx(plan.predicted.step_seconds)
    for member in range(costs.group.members):
        held = costs.placement.experts_held(member)
        there = in_flight(plan.schedule, plan.wave, plan.step.microbatches, plan.model.layers)
        assert member_memory(costs.group, member, held, there).total <= usable(costs.group, member)


def test_gpus_that_would_slow_a_step_are_left_out_with_a_reason():
    on = cluster(4, 4)
    crawling = profile(OF, (1.0, 2.0), (0.5, 1.0))
    found = search(question(), on, kinds(on, old=crawling))
    left = left_out(found, on)
    assert {one.pool for one in left} == {"old"} and sum(one.gpus for one in left) == 4
    assert all(one.reason for one in left)


def test_a_role_may_have_several_kinds():
    on = Cluster({name: pool(name, 2, 1) for name in ("new", "old", "older")})
    found = search(question(), on, kinds(on))
    assert any(len(one.option.expert) == 2 for one in found.best)


def test_small_memory_means_smaller_waves():
    roomy, tight = cluster(2, 2), cluster(2, 2, memory=1.672e9)
    waves = [search(question(), on, kinds(on)).best[0].wave for on in (roomy, tight)]
    assert waves[1] < waves[0]


def test_where_nothing_fits_the_nearest_is_named():
    of = shape(layers=40, experts=16)
    on = cluster(2, 2, memory=1.74e9)
    assert not search(question(of), on, kinds(on, of)).best
    text = " ".join(nothing_fits(question(of), on, kinds(on, of)))
    assert "GB" in text and "layers in place of 40" in text and "nodes of" in text
    odd = " ".join(nothing_fits(question(batch=1), cluster(1, 1).only("new"), kinds(cluster(1, 1))))
    assert "global batch" in odd


def test_what_is_said_to_fit_fits_and_no_less_does():
    of = shape(layers=40, experts=16)
    on = cluster(2, 2, memory=1.74e9)
    priced = kinds(on, of)
    text = " ".join(nothing_fits(question(of), on, priced))
    layers, more_new, more_old = (int(re.search(pattern, text)[1]) for pattern in (
        r"(\d+) layers in place of 40", r"(\d+) nodes of new in place of 1", r"(\d+) nodes of old in place of 1"))
    assert float(re.search(r"lacks ([\d.]+) GB", text)[1]) > 0

    def found(of, new, old):
        pools = {"new": replace(on.pools["new"], nodes=new), "old": replace(on.pools["old"], nodes=old)}
        return bool(search(question(of), Cluster(pools), priced, thorough=False).best)

    assert found(shape(layers=layers, experts=16), 1, 1) and not found(shape(layers=layers + 1, experts=16), 1, 1)
    assert found(of, more_new, 1) and not found(of, more_new - 1, 1)
    assert found(of, 1, more_old) and not found(of, 1, more_old - 1)


def test_a_smaller_model_predicts_as_many_further_tokens():
    of = replace(shape(layers=6, moe_layers=(1, 3, 5, 6)), mtp_layers=2)
    fewer = smaller(question(of), 3).shape
    assert (fewer.layers, fewer.decoder_layers, fewer.moe_layers) == (5, 3, (1, 3, 4, 5))


def test_what_the_pools_would_do_alone():
    """By the same prices as a run of one pool; a pool that cannot hold the model does nothing."""
    on = Cluster({"new": pool("new", 4, 1), "old": pool("old", 4, 1, memory=1e9)})
    priced = kinds(on)
    by_name = {one.pool: one for one in alone(question(), on, priced)}
    assert by_name["old"].tokens_per_second is None and by_name["old"].expert_parallel is None
    new = by_name["new"]
    seats = seats_of(["new"] * 4, on, priced)
    step = Step(1, 4, 1000, distributed_optimizer=True)
    speeds = [expert_parallel_tokens_per_second(
        GroupCosts(OF, step, seats[:size], size, 4 // size, PRECISION), seats, size) for size in (1, 2, 4)]
    assert new.tokens_per_second == pytest.approx(max(speeds)) and new.expert_parallel in (1, 2, 4)


def test_after_a_node_is_lost_no_more_gpus_are_used_than_are_left():
    on = Cluster({"new": pool("new", 2, 2), "old": pool("old", 2, 2)})
    lost = after_losing_a_node(question(), on, kinds(on))
    for name, one in lost.items():
        used = one.option.used()
        assert all(used.get(other, 0) <= (2 if other == name else 4) for other in ("new", "old"))
        rest = on.without_node(name)
        assert one.tokens_per_second == search(question(), rest, kinds(rest), thorough=False).best[0].tokens_per_second
    alone_left = Cluster({"new": pool("new", 1, 1), "old": pool("old", 1, 1)})
    assert after_losing_a_node(question(), alone_left, kinds(alone_left))["old"] is None


def test_what_is_left_without_a_node_and_without_the_other_pool():
    on = Cluster({"new": pool("new", 2, 2), "old": pool("old", 2, 1)})
    priced = kinds(on)
    lost = after_losing_a_node(question(), on, priced)
    assert lost["new"].option.used()["new"] <= 2
    assert lost["old"] is None or "old" not in lost["old"].option.used()
    assert {one.pool for one in alone(question(), on, priced)} == {"new", "old"}
    others = baselines(search(question(), on, priced).best[0])
    assert all(one.tokens_per_second > 0 for one in others)


@pytest.mark.parametrize("schedule", ["zebra", "overlapped"])
@pytest.mark.parametrize("wave", [None, 7, 11, 20])
def test_long_steps_are_extended_as_they_are(wave, schedule):
    priced = group(2, 2, microbatches=40, of=shape(layers=3))
    counts = counts_of(spread(priced, [2, 3]))
    exact = step_seconds(priced, counts, schedule, wave)
    assert long_step_seconds(priced, counts, wave, schedule) == pytest.approx(exact, rel=1e-3)
    assert np.isfinite(exact).all()


def test_the_bound_counts_no_more_than_there_is():
    """Twice as fast GPUs, twice the bound."""
    on = cluster(2, 2, bandwidth=1e12, latency=0)
    slow = next(option for option in options(question(), on, kinds(on)) if option.m == 2)
    fast_profile = profile(OF, (2.5e-3, 5e-3), (0.75e-4, 1.5e-4))
    doubled = kinds_of(on, OF, PRECISION, Notes(), {
        "new": profile(OF, (5e-4, 1e-3), (5e-5, 1e-4)), "old": fast_profile})
    fast = next(option for option in options(question(), on, doubled)
                if (option.attention, option.expert, option.groups) == (slow.attention, slow.expert, slow.groups))
    assert fast.bound == pytest.approx(2 * slow.bound, rel=1e-3)
    assert replace(slow, groups=1).bound > 0


def test_gpus_without_bf16_take_experts_only_and_have_them_in_fp16():
    on, old = cluster(4, 4), profile(OF, (1e-4, 2e-4), (1e-4, 2e-4))
    without = replace(old, taken_for={**old.taken_for, "precision": "fp16"})
    for slow, precision in ((old, "bf16"), (without, "fp16")):
        found = search(question(), on, kinds(on, old=slow))
        attention = {name for one in found.best for name, _ in one.option.attention}
        assert ("old" in attention) == (slow is old)
        assert {one.plan().expert_precision for one in found.best if "old" in one.option.used()} == {precision}
        assert {one.plan().attention_precision for one in found.best} == {"bf16"}


def test_attention_in_bf16_needs_a_pool_that_has_it():
    old = profile(OF)
    without = replace(old, taken_for={**old.taken_for, "precision": "fp16"})
    on = Cluster({"old": pool("old", 4, 1)})
    [said] = nothing_fits(question(), on, kinds(on, old=without))
    assert "no pool has bf16" in said and "--fp16" in said


SHARED = replace(question(), tensor=(1, 2, 4))


def test_ranks_that_share_a_microbatch_divide_what_they_share():
    on = cluster(8, 4)
    found = list(options(SHARED, on, kinds(on)))
    assert {option.group.tensor for option in found} == {1, 2}  # of two query groups none is shared by four
    for option in found:
        group = option.group
        assert group.replicas * group.tensor == option.m and option.tokens == 16 * OF.sequence
        assert group.step.microbatches * group.replicas * option.groups == 16
        assert all(count % group.tensor == 0 for _, count in option.attention)


def test_sharing_costs_gathers_and_saves_memory():
    """On links without latency that are as good as infinite, two ranks do half each; the experts' work is the same."""
    alone, shared = group(2, 2), replace(group(4, 2), tensor=2)
    assert alone.replicas == shared.replicas and alone.expert_tokens == shared.expert_tokens
    one, two = alone.attention[0], shared.attention[0]
    assert all(half < both for way in (0, 1) for half, both in zip(two[way][:3], one[way][:3]))
    middle = 1  # with attention alone: two gathers forward, three backward
    gather = 128 * 64 * 2 / 2 / 1e9 + 1e-5
    assert two[0][middle] == pytest.approx(one[0][middle] / 2 + 2 * gather)
    assert two[1][middle] == pytest.approx(one[1][middle] / 2 + 3 * gather)
    few, many = (member_memory(priced, 0, 0, 4) for priced in (shared, alone))
    assert few.weights == many.weights / 2 and few.activations == many.activations / 2
    assert TaskCosts(shared, spread(shared, [4, 5])).transfer(Task(Kind.DISPATCH, Pass.FORWARD, 1, 0)).seconds \
        == pytest.approx(TaskCosts(alone, spread(alone, [2, 3])).transfer(Task(Kind.DISPATCH, Pass.FORWARD, 1, 0)).seconds)


def test_microbatches_are_shared_where_memory_needs_it():
    of = shape(layers=30, experts=4, topk=1)
    on = cluster(4, 4, memory=1.6805e9)
    priced = kinds(on, of)
    ask = replace(question(of, batch=4), tensor=(1, 2))
    assert not search(replace(ask, tensor=(1,)), on, priced, thorough=False).best
    best = search(ask, on, priced).best[0]
    assert best.option.group.tensor == 2 and "2 a microbatch" in best.option.describe()
    plan = plan_from_json(best.plan().to_json(), "plan.json")
    assert plan.tensor_parallel == 2
    costs = costs_of_plan(plan, on, priced)
    orders = build(plan.schedule, of.layers, costs.placement, plan.attention_ranks // plan.groups,
                   plan.step.microbatches, plan.wave)
    assert simulate(orders, costs).seconds == pytest.approx(plan.predicted.step_seconds)


def test_weight_tasks_are_planned_where_they_are_worth_it():
    """With one microbatch each rank waits for the other, with many the slower one never does."""
    on = cluster(1, 1, bandwidth=1e10)
    experts_on_old = {"new": profile(OF, (1e-3, 2e-3), (4e-3, 8e-3)), "old": profile(OF, (5e-3, 1e-2), (3e-4, 7e-4))}
    of_pool = kinds_of(on, OF, PRECISION, Notes(), experts_on_old)
    for batch, chosen in ((1, "delayed"), (32, "together")):
        asked = replace(question(batch=batch), weight_gradients=("together", "delayed"))
        best = search(asked, on, of_pool).best[0]
        plan = best.plan()
        assert plan.weight_gradients == chosen
        orders = build(plan.schedule, plan.model.layers, placement_of(best.assignment.experts), 1,
                       plan.step.microbatches, plan.wave, weight_gradients=plan.weight_gradients)
        assert simulate(orders, costs_of_plan(plan, on, of_pool)).seconds == pytest.approx(plan.predicted.step_seconds)
        assert search(question(batch=batch), on, of_pool).best[0].plan().weight_gradients == "together"


def overhead(of):
    """A profile in which an expert's backward has a part that does not grow with its tokens: the sum of weights' gradients."""
    one = profile(of)
    fixed = 1e-3
    parts = {**one.parts, "expert": {1.0: (1e-6, fixed), 64.0: (1e-4, 2e-4 + fixed), 4096.0: (64e-4, 128e-4 + fixed)}}
    return replace(one, parts=parts)


def test_gradients_of_weights_are_merged_where_their_sums_take_long():
    on = cluster(2, 2)
    of_pool = kinds_of(on, OF, PRECISION, Notes(), dict.fromkeys(("new", "old"), overhead(OF)))
    plain = search(question(), on, of_pool).best[0]
    chosen = search(replace(question(), weight_gradients=("together", "delayed", "merged")), on, of_pool).best[0]
    assert chosen.plan().weight_gradients == "merged"
    assert chosen.assignment.seconds < 0.9 * plain.assignment.seconds
    again = costs_of_plan(chosen.plan(), on, of_pool)
    orders = build(chosen.schedule, OF.layers, again.placement, chosen.option.m, chosen.plan().step.microbatches, chosen.wave,
                   weight_gradients="merged")
    assert simulate(orders, again).seconds == pytest.approx(chosen.assignment.seconds)
    assert chosen.bytes_of("expert") > replace(chosen, weight_gradients="together").bytes_of("expert")


def test_amortised_costs_have_as_much_work_as_merged_tasks():
    costs = group(2, 2, of=OF, new=overhead(OF), old=overhead(OF))
    placement = spread(costs, range(2, 4))
    tasks, wave = TaskCosts(costs, placement, "merged"), 4
    work = sum(tasks.seconds(2, Task(Kind.EXPERT, Pass.BACKWARD, 1, microbatch)) for microbatch in range(wave))
    work += tasks.seconds(2, Task(Kind.EXPERT, Pass.WEIGHT, 1, wave - 1), wave)
    assert costs.amortised(wave).expert[2][1] * 2 * wave == pytest.approx(work)  # of two experts
    assert costs.amortised(wave).expert[2][1] < costs.expert[2][1]


@pytest.mark.parametrize("memory, schedule, gain", [
    (1.676e9, "overlapped", 0.25), (1.68e9, "zebra", 0), (1.684e9, "overlapped", 0.01), (40e9, "zebra", 0)
])
def test_waves_overlap_where_that_is_faster_and_fits(memory, schedule, gain):
    """Never a slower plan than without, and a faster one where memory keeps waves small."""
    of = shape(layers=8, experts=4)
    on = cluster(2, 2, memory=memory)
    apart, best = (
        search(replace(question(of), schedules=schedules), on, kinds(on, of)).best[0]
        for schedules in (("zebra",), ("zebra", "overlapped"))
    )
    assert best.tokens_per_second >= (1 + gain) * apart.tokens_per_second
    assert best.schedule == best.plan().schedule == schedule and apart.plan().schedule == "zebra"


def test_an_overlapped_wave_has_one_layer_more():
    """Of activations alone; experts that are not spread over layers have more, and are refused where that does not fit."""
    assert in_flight("overlapped", 3, 6, 4) == 3.75
    assert in_flight("overlapped", 6, 6, 4) == in_flight("zebra", 6, 12, 4) == 6
    limits, first = Limits((4, 4)), np.array([[0, 4], [4, 0]])
    spread_out = np.array([[2, 2], [2, 2]])
    assert feasible(spread_out, limits, "overlapped") and feasible(first, limits)
    assert not feasible(first, limits, "overlapped")


def test_the_activation_runs_again_where_memory_keeps_waves_small():
    """It frees that of each row, takes the backward a little longer, and is planned where larger waves are worth that."""
    of = shape(layers=4, experts=4, sequence=4096)
    once = GroupCosts(of, Step(1, 8, 1000), group(2, 2, of).seats, 2, 1, PRECISION)
    again = replace(once, step=replace(once.step, activation_again=True))
    assert expert_row_bytes(once, 2) - expert_row_bytes(again, 2) == 2 * of.expert_ffn
    new, old = profile(of), profile(of, (0.1, 0.2))
    longer = {size: (forward, 1.01 * backward) for size, (forward, backward) in new.parts["expert"].items()}
    asked = replace(question(of), activation_again=(False, True), schedules=("zebra",))

    def chosen(memory: float, parts: dict) -> bool:
        on = Cluster({"new": pool("new", 2, 1), "old": pool("old", 2, 1, memory=memory)})
        kinds = {name: replace(one, parts={**one.parts, **parts}) for name, one in (("new", new), ("old", old))}
        return search(asked, on, kinds_of(on, of, PRECISION, Notes(), kinds)).best[0].plan().step.activation_again

    assert chosen(1.69e9, {"expert_activation_again": longer})
    assert not chosen(1.69e9, {}) and not chosen(40e9, {"expert_activation_again": longer})


STAGED = shape(layers=30, experts=4, topk=1)


def staged_question(**changed):
    return replace(question(STAGED, batch=8), stage_layers=((), *divisions(STAGED)), expert_tensor=(1, 2), **changed)


def test_layers_divide_as_megatrons_flags_can_say():
    assert divisions(shape(layers=32))[1] == (8, 8, 8, 8)
    assert divisions(shape(layers=27)) == ((14, 13), (7, 7, 7, 6))  # eight stages would be 3, ..., 3 and 6
    assert divisions(shape(layers=4, moe_layers=(3, 4))) == ()  # a stage without experts


def test_pipelines_are_planned_where_memory_calls_for_them():
    """One stage cannot hold the layers; two can, and the plan says what the simulator says, within memory."""
    on = cluster(4, 4, memory=1.6805e9)
    priced = kinds(on, STAGED)
    assert not search(staged_question().plain, on, priced, thorough=False).best
    best = search(staged_question(), on, priced).best[0]
    assert best.option.stage_layers == (15, 15) and "2 stages x" in best.option.describe()
    assert best.tokens_per_second <= best.option.bound
    plan = plan_from_json(best.plan().to_json(), "plan.json")
    assert plan.stages == 2 and layout_of(plan).world_size == sum(best.option.used().values()) == 8
    simulated = predict(plan, on, "plan.json", Notes(), priced).results[0].seconds
    assert simulated == pytest.approx(plan.predicted.step_seconds, rel=0.02)
    for stage in range(2):
        costs = costs_of_plan(plan, on, priced, stage)
        there = in_flight("zebra", plan.wave, plan.step.microbatches, 15, ahead=1 - stage)
        for member in range(costs.group.members):
            memory = member_memory(costs.group, member, costs.placement.experts_held(member), there)
            assert memory.total <= usable(costs.group, member)
    lost = after_losing_a_node(staged_question(), on, priced, best)
    assert lost == {"new": None, "old": None}


@pytest.mark.parametrize("batch", [8, 48])  # so long that some waves are simulated and the others reckoned
def test_a_recipes_virtual_stages_are_planned(batch):
    of = shape(layers=7, moe_layers=(1, 2, 4, 5, 6, 7))
    on = cluster(4, 4)
    priced = kinds(on, of)
    asked = replace(question(of, batch=batch), stage_layers=((2, 2, 1, 2),), virtual_stages=2)
    best = search(asked, on, priced).best[0]
    assert best.option.layers == ((1, 2, 5), (3, 4, 6, 7)) and "2 stages of 2 chunks x" in best.option.describe()
    assert best.tokens_per_second <= best.option.bound
    plan = plan_from_json(best.plan().to_json(), "plan.json")
    assert (plan.stages, plan.virtual_stages, plan.stage_layers, len(plan.tasks)) == (2, 2, (2, 2, 1, 2), 2)
    assert not stage_problems(plan) and plan.placement[2] == () and all(plan.placement[layer - 1] for layer in of.moe_layers)
    simulated = predict(plan, on, "plan.json", Notes(), priced)
    assert simulated.results[0].seconds == pytest.approx(plan.predicted.step_seconds, rel=0.03)
    single = search(replace(asked, stage_layers=((4, 3),), virtual_stages=1), on, priced).best[0]
    assert best.tokens_per_second > 0.8 * single.tokens_per_second


def test_a_stage_has_more_waves_on_the_way_with_virtual_stages():
    """As many chunks' forwards as come before its first backward (Megatron's warm-up), and the one at hand."""
    assert [waves_ahead(stage, 4) for stage in range(4)] == [3, 2, 1, 0]
    for stage in range(4):
        ahead = next(place for place, (_, unit) in enumerate(chunk_units(stage, 4, 2, 8, False)) if unit.backward is not None)
        both = stage == 3  # in the last part a unit is forward and backward of a wave
        assert waves_ahead(stage, 4, 2) == (ahead + both) / 2 - 1


def test_a_recipes_context_parallelism_is_planned():
    on = cluster(8, 4)
    asked = replace(SHARED, context=2, tensor=(1, 2))
    for option in options(asked, on, kinds(on)):
        assert option.group.replicas * option.group.tensor * 2 == option.m and option.tokens == 16 * OF.sequence
    best = search(asked, on, kinds(on)).best[0]
    assert "2 parts of a sequence" in best.option.describe()
    plan = plan_from_json(best.plan().to_json(), "plan.json")
    assert plan.context_parallel == 2 and layout_of(plan).microbatches * plan.step.microbatches == 16
    simulated = predict(plan, on, "plan.json", Notes(), kinds(on)).results[0].seconds
    assert simulated == pytest.approx(plan.predicted.step_seconds, rel=0.02)


def test_parts_of_a_sequence_cost_gathers_of_keys_and_values():
    """Two ranks do half each, and gather two groups' keys and values, 16 wide, of 128 tokens; weights are on both."""
    alone, shared = group(2, 2), replace(group(4, 2), context=2)
    assert (shared.replicas, shared.copies, shared.expert_tokens) == (2, 4, alone.expert_tokens)
    one, two = alone.attention[0], shared.attention[0]
    of = shared.shape
    gather = 128 * of.key_value_width * 2 / 2 / 1e9 + 1e-5
    for way in (0, 1):
        assert two[way][1] == pytest.approx(one[way][1] / 2 + gather)
        assert two[way][-1] == pytest.approx(one[way][-1] / 2), "no attention behind the last layer"
    few, many = (member_memory(priced, 0, 0, 4) for priced in (shared, alone))
    assert few.weights == many.weights and few.activations == pytest.approx(
        many.activations / 2 + 4 * of.layers * 64 * of.key_value_width * 2)
    assert shared.reduction(0, 0) > alone.reduction(0, 0)


def test_no_pipeline_where_one_stage_has_room():
    on = cluster(4, 4)
    found = search(staged_question(), on, kinds(on, STAGED))
    assert all(one.option.is_plain for one in found.best)
    asked = replace(question(STAGED, batch=8), stage_layers=((10, 20),))
    assert search(asked, on, kinds(on, STAGED)).best[0].plan().stage_layers == (10, 20)


def test_experts_are_shared_where_they_do_not_divide():
    """Of two experts of a layer on four ranks each would have a half; on whole ones two would wait."""
    of = shape(layers=2, experts=2, hidden=256)
    on = cluster(1, 4, bandwidth=1e12, latency=0)
    priced = kinds_of(on, of, PRECISION, Notes(), {
        "new": profile(of, expert=(0.3, 0.6)), "old": profile(of, (1.0, 2.0), (3e-3, 6e-3))})
    asked = replace(question(of, batch=2), expert_tensor=(1, 2))
    whole, best = (search(one, on, priced).best[0] for one in (asked.plain, asked))
    assert best.option.group.expert_tensor == 2 and "2 an expert" in best.option.describe()
    assert best.tokens_per_second > whole.tokens_per_second
    plan = plan_from_json(best.plan().to_json(), "plan.json")
    assert plan.expert_tensor_parallel == 2 and plan.expert_ranks == 4
    assert all(holder >= plan.attention_ranks for layer in plan.placement for holder in layer)
    assert predict(plan, on, "plan.json", Notes(), priced).results[0].seconds == pytest.approx(plan.predicted.step_seconds)


def test_sharing_an_expert_halves_what_a_rank_has_of_it():
    of = shape(experts=4)
    whole = group(2, 2, of)
    shared = replace(whole, expert_tensor=2)
    one, half = (member_memory(priced, 2, 6, 2) for priced in (whole, shared))
    assert half.weights == one.weights / 2 and half.optimizer == one.optimizer / 2
    inside = 3 * of.expert_ffn * 2
    assert expert_row_bytes(whole, 2) - expert_row_bytes(shared, 2) == inside / 2  # the input is on both
    once = (5 / 6) / (2 * 2 / 4)  # of the two experts that a holder has: tokens that go to it, over those of each
    copies = 2 * (once * whole.expert_tokens * of.hidden * 2 / 2 / 1e9 + 1e-5 / 2)
    assert shared.expert[2][0] == pytest.approx(whole.expert[2][0] / 2 + copies)
    assert shared.reduction(2, 6) <= whole.reduction(2, 6)
    loads = [TaskCosts(priced, spread(whole, [2, 3])).transfer(Task(Kind.DISPATCH, Pass.FORWARD, 1, 0)).loads
             for priced in (shared, whole)]
    assert loads[0].max() <= loads[1].max()


def test_what_follows_a_step_counts_once_whoever_has_most_of_it():
    """Expert ranks reduce and update far more than attention ranks, and are done with their tasks earlier."""
    priced = group(2, 2, microbatches=40, of=shape(layers=3), old=profile(shape(layers=3), optimizer=1e-6),
                   new=profile(shape(layers=3), optimizer=1e-9), groups=2)
    counts = counts_of(spread(priced, [2, 3]))
    assert long_step_seconds(priced, counts, 2) == pytest.approx(step_seconds(priced, counts, "zebra", 2), rel=0.01)


def test_other_ways_say_what_keeps_them_from_it():
    """Stock Megatron has attention on all ranks, all in one precision, and a part of the experts on each."""
    on = cluster(2, 2)
    best = search(question(), on, kinds(on)).best[0]
    assert all(one.obstacle is None for one in baselines(best))
    assert [one.name for one in baselines(best) if not one.runs] == ["ideal sum of pools"]
    group = best.option.group
    seats = [replace(seat, pool=replace(seat.pool, memory=1.6e9)) if seat.pool.name == "old" else seat for seat in group.seats]
    small = replace(best, option=replace(best.option, group=replace(group, seats=tuple(seats))))
    assert {one.name for one in baselines(small) if one.obstacle == "does not fit"} >= {"expert parallelism over all ranks"}


def test_a_plan_for_fewer_nodes_is_one_for_all():
    """Where it is faster it leads; what was best stays the first runner-up."""
    on = cluster(2, 2)
    found = search(question(), on, kinds(on))
    slower = replace(found.best[-1], tokens_per_second=0.5 * found.best[0].tokens_per_second)
    headed = replace(found, best=(slower, *found.best))
    assert with_fewer_nodes(found, {"new": None, "old": slower}) is found
    again = with_fewer_nodes(replace(found, best=(slower,)), {"new": found.best[0], "old": None})
    assert again.best[0].tokens_per_second > slower.tokens_per_second and again.best[1] is slower
    assert with_fewer_nodes(headed, {"old": slower}) is headed
