"""Device table, profiles, interpolation, cluster files and prices of tasks."""

import json
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from pricing import PRECISION, cluster, group, profile, shape

from megatron_hetermoe.config.errors import UsageError
from megatron_hetermoe.config.plan import Plan, plan_from_json
from megatron_hetermoe.config.step import Prediction, Step
from megatron_hetermoe.cost.cluster import cluster_from_document, kinds_of
from megatron_hetermoe.cost.curves import Curve, Notes
from megatron_hetermoe.cost.devices import device_table
from megatron_hetermoe.cost.estimate import Estimate
from megatron_hetermoe.cost.profile import Profiled, read_profile
from megatron_hetermoe.cost.tasks import TaskCosts
from megatron_hetermoe.cost.work import crossing_share, dense_parameters, projection_width
from megatron_hetermoe.planner.memory import member_memory
from megatron_hetermoe.schedule.tasks import Kind, Pass, Task
from megatron_hetermoe.simulator.baselines import spread
from megatron_hetermoe.topology.placement import Placement

LINK = {"gb_per_s": 10, "latency_us": 10}
POOL = {"kind": "A40", "nodes": 2, "gpus_per_node": 2, "intra_node": LINK, "inter_node": LINK}


def test_a_curve_passes_its_points_and_is_a_power_law_between():
    notes = Notes()
    curve = Curve("x", "tokens", {size: 3 * size**1.5 for size in (100, 1000, 10000)}, notes)
    assert curve(1000) == pytest.approx(3 * 1000**1.5)
    assert curve(4000) == pytest.approx(3 * 4000**1.5)
    assert not notes
    assert curve(0) == 0


def test_a_curve_says_when_it_leaves_its_range():
    notes = Notes()
    curve = Curve("attention of A40", "tokens", {1000: 1.0, 2000: 4.0}, notes)
    assert curve(500) == 1.0
    assert curve(4000) == pytest.approx(16.0)
    assert len(notes) == 2 and all("attention of A40" in note for note in notes)


def test_a_curve_never_falls():
    curve = Curve("x", "tokens", {1: 1.0, 2: 3.0, 4: 2.5, 8: 9.0}, Notes())
    values = [curve(1 + step / 10) for step in range(90)]
    assert values == sorted(values)


def test_the_device_table_knows_what_lacks_flash_attention():
    table = device_table()
    assert not table["V100-SXM2"].flash_attention and table["A40"].flash_attention
    assert all(device.memory and device.bandwidth > 1e11 for device in table.values())


def test_an_estimate_says_so_and_orders_gpus_as_they_are():
    notes = Notes()
    of = replace(shape(hidden=1024, sequence=8192), heads=16, head_dim=64)
    new, old = (Estimate(device_table()[name], of, notes) for name in ("A40", "V100-SXM2"))
    attention, expert = (old.attention(8192, "none")[0] / new.attention(8192, "none")[0],
                         old.expert(4096, "none")[0] / new.expert(4096, "none")[0])
    assert attention > expert > 1
    assert sum("estimated" in note for note in notes) == 2


def test_a_cluster_file_is_refused_with_all_problems():
    document = {"pools": {
        "a": {**POOL, "kind": "A41"}, "b": {**POOL, "nodes": 0, "gpu": 3},
        "c": {**POOL, "inter_node": {"gb_per_s": -1, "latency_us": 1}}, "d": 7, "e": {**POOL, "kind": "V100-SXM2"},
    }, "pool": 1}
    with pytest.raises(UsageError) as error:
        cluster_from_document(document, "c.yaml")
    text = error.value.message()
    for part in ("A41", "did you mean A40", "nodes is 0", "'gpu'", "gb_per_s is -1", "pool d is not", "memory_gb",
                 "'pool'"):
        assert part in text, part
    assert cluster_from_document({"pools": {"a": POOL}}, "c.yaml").pools["a"].memory == 48e9


def test_a_profile_file_is_read_back(tmp_path):
    of = shape()
    path = tmp_path / "p.json"
    path.write_text(profile(of, expert_task=(1e-4, 3e-4)).to_json())
    found = read_profile(path)
    assert found.parts["attention"][64.0] == (5e-4, 1e-3) and found.expert_task == (1e-4, 3e-4)


def test_a_profile_is_refused_with_all_problems(tmp_path):
    of = shape()
    document = json.loads(profile(of).to_json())
    document["parts"]["expert"] = {"64": [1e-3, -1]}
    del document["parts"]["attention"]
    document["colour"] = 1
    document["expert_task"] = [1e-4]
    path = tmp_path / "p.json"
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError) as error:
        read_profile(path)
    assert len(error.value.problems) == 4
    path.write_text("no json")
    with pytest.raises(UsageError):
        read_profile(path)


def test_a_profile_for_other_shapes_is_refused():
    with pytest.raises(UsageError, match="hidden 64 there, 128 here"):
        Profiled(profile(shape()), shape(hidden=128), PRECISION, Notes())
    with pytest.raises(UsageError, match="precision bf16 there, fp16 here"):
        kinds_of(cluster(), shape(), "fp16", Notes(), {"new": profile(shape()), "old": profile(shape())})


def test_experts_cost_by_their_number_and_bytes_by_their_holders():
    priced = group(2, 2, microbatches=1)
    costs = TaskCosts(priced, Placement(((2, 2, 2, 2, 2, 2, 3, 3),) * 3, 4))
    one, other = (costs.seconds(member, Task(Kind.EXPERT, Pass.FORWARD, 1, 0)) for member in (2, 3))
    assert one == pytest.approx(3 * other)
    # Two of 28 pairs are not among the six experts of the fullest holder; each of these gets a quarter of all tokens.
    rows, copies = 128 * 27 / 28, 6 * 128 * 2 / 8
    dispatch = costs.transfer(Task(Kind.DISPATCH, Pass.FORWARD, 1, 0))
    assert dispatch.seconds == pytest.approx(2 * (rows * 64 * 2 + copies * (4 + 4)) / 1e9)  # into the fullest holder
    combine = costs.transfer(Task(Kind.COMBINE, Pass.FORWARD, 1, 0))
    assert combine.seconds == pytest.approx(2 * rows * 64 * 2 / 1e9)
    back = costs.transfer(Task(Kind.DISPATCH, Pass.BACKWARD, 1, 0))
    assert back.seconds == pytest.approx(2 * (rows * 64 * 2 + copies * 4) / 1e9)


@pytest.mark.parametrize("experts, topk, held", [(8, 2, 3), (8, 3, 6), (5, 4, 2), (4, 1, 1), (6, 6, 1), (7, 2, 7), (7, 2, 0)])
def test_the_share_of_tokens_that_cross_is_that_of_all_choices(experts, topk, held):
    """Counted over every choice of k experts."""
    choices = list(combinations(range(experts), topk))
    crossing = sum(min(chosen) < held for chosen in choices)
    of = shape(experts=experts, topk=topk)
    assert crossing_share(of, held) == pytest.approx(crossing / len(choices))
    assert crossing_share(of, np.array([held, 0])) == pytest.approx([crossing / len(choices), 0])


def test_a_further_token_is_a_layer_more_and_a_head():
    """Its A task has what joins a hidden state and an embedding too, which is as large as the width says."""
    of = replace(shape(layers=4, moe_layers=(1, 3, 4)), mtp_layers=1)
    priced = group(2, 2, of=of, new=profile(of, head=(1e-3, 2e-3)))
    forward, _ = priced.attention[0]
    joining = priced.seats[0].kind.feed_forward(projection_width(of), 128, "none")[0]
    assert forward[3] == pytest.approx(forward[1] + joining) and joining > 0
    assert forward[4] == pytest.approx(2e-3)  # the main head, and one more
    plain = shape(layers=4, moe_layers=(1, 3, 4))
    joined = 2 * of.hidden * of.hidden
    assert dense_parameters(of, 1000) - dense_parameters(plain, 1000) == joined + 3 * of.hidden
    ungated = replace(of, gated=False)
    assert 2 * ungated.hidden * projection_width(ungated) == joined  # two matrices that wide are the one
    grown = member_memory(priced, 0, 0, 1).total - member_memory(group(2, 2, of=plain), 0, 0, 1).total
    assert grown > 128 * 1000 * 4  # the second head's logits


def test_the_typical_task_is_the_median_of_those_that_have_it():
    priced = group(2, 2, of=shape(layers=3, moe_layers=(1, 3)), microbatches=1)
    costs = TaskCosts(priced, Placement(((2, 2, 2, 2, 2, 2, 3, 3), (), (0, 2, 2, 2, 2, 2, 2, 3)), 4))
    typical = costs.typical()
    one = sum(priced.expert[2]) / 3  # forward is a third
    assert typical.expert_forward == pytest.approx(4 * one)  # of 6, 2, 6 and 1 experts
    assert typical.moved_backward == pytest.approx(2 * one)
    assert typical.attention_forward == pytest.approx(1e-3)
    dispatch = [costs.transfer(Task(Kind.DISPATCH, Pass.FORWARD, layer, 0)) for layer in (1, 3)]
    assert typical.dispatch_forward == pytest.approx(sum(one.seconds + one.latency for one in dispatch) / 2)
    none = TaskCosts(priced, Placement(((2,) * 8, (), (3,) * 8), 4)).typical()
    assert none.moved_forward == 0 and none.expert_forward == pytest.approx(8 * one)


def test_a_measured_channel_replaces_what_links_say(tmp_path):
    measured = cluster_from_document({"pools": {"new": POOL, "old": POOL}, "channel": {1000: 1.0, 1e9: 2.0}}, "c.yaml")
    assert all(pool.channel(1000) == 1.0 for pool in measured.pools.values())
    priced = group(2, 2, microbatches=1, on=measured)
    costs = TaskCosts(priced, Placement(((2, 2, 2, 2, 2, 2, 3, 3),) * 3, 4))
    transfer = costs.transfer(Task(Kind.DISPATCH, Pass.FORWARD, 1, 0))
    assert 1.0 < transfer.seconds < 2.0 and transfer.latency == 0
    assert transfer.loads.max() == pytest.approx(transfer.seconds)
    with pytest.raises(UsageError, match="channel must map bytes to seconds"):
        cluster_from_document({"pools": {"new": POOL}, "channel": {1000: -1.0}}, "c.yaml")


def test_what_a_member_sends_itself_is_no_traffic():
    alone = group(1, 1, microbatches=1)
    assert TaskCosts(alone, spread(alone, [0])).transfer(Task(Kind.DISPATCH, Pass.FORWARD, 1, 0)).seconds == 0


def test_reduction_grows_with_groups_and_dense_weights():
    assert group(2, 2, groups=1).reduction(2, 3) == 0
    assert group(2, 2, groups=2).reduction(2, 3) > 0
    assert group(2, 2, groups=1).reduction(0, 0) > 0
    assert math.isclose(group(1, 1).reduction(0, 0), 0)


def test_a_plan_with_what_was_predicted_is_read_back():
    plan = Plan(shape(), 2, 2, 1, ((2, 3) * 4,) * 3, pools=("new", "new", "old", "old"), step=Step(1, 4, 1000),
                predicted=Prediction(1.0, 2.0, 0.5, 0.5, 1e9, 1e9, True))
    assert plan_from_json(plan.to_json(), "plan.json") == plan
    document = json.loads(plan.to_json())
    document["step"]["microbatches"] = "many"
    document["predicted"] = 3
    with pytest.raises(UsageError) as error:
        plan_from_json(json.dumps(document), "plan.json")
    assert len(error.value.problems) == 2
