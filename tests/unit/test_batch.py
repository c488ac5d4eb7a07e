"""Which nodes a job asks for, and how its ranks are told apart."""

from __future__ import annotations

import dataclasses

import pytest
from pricing import pool as priced
from shapes import shape

from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.cost.cluster import Cluster
from megatron_hetermoe.cost.slurm import slurm_options
from megatron_hetermoe.planner.batch import Component, components, one_component


def cluster(**slurm):
    """Two pools of two nodes with two GPUs each, as "new" and "old", with options of sbatch."""
    kinds = {"new": "A40", "old": "V100-SXM2"}
    return Cluster({name: dataclasses.replace(priced(name, kind=kinds.get(name, "T4")), slurm=options)
                    for name, options in slurm.items()})


PARTITIONS = {"new": {"partition": "a"}, "old": {"partition": "b"}}
FEATURES = {"new": {"constraint": "a40"}, "old": {"constraint": "v100"}}


def plan(attention, expert, pools=(), groups=1):
    return Plan(shape(), attention, expert, groups, ((), ()), pools=pools)


def asked(how, *args):
    problems = Problems()
    result = how(*args, problems)
    problems.raise_if_any()
    return result


def test_roles_take_pools_in_the_file_s_order():
    new, old = asked(components, cluster(**PARTITIONS), plan(4, 2))
    assert new == Component("attention", 2, {
        "partition": "a", "nodes": "2", "ntasks-per-node": "2", "gpus-per-node": "2"})
    assert old == Component("expert", 1, {
        "partition": "b", "nodes": "1", "ntasks-per-node": "2", "gpus-per-node": "2"})


def test_a_node_may_be_partly_used():
    new, old = asked(components, cluster(**PARTITIONS), plan(3, 1))
    assert (new.nodes, new.options["ntasks"], new.options["gpus-per-node"]) == (2, "3", "2")
    assert (old.nodes, old.options["ntasks-per-node"], old.options["gpus-per-node"]) == (1, "1", "1")


def test_what_a_pool_says_of_gpus_counts():
    slurm = {"new": {"partition": "a", "gres": "gpu:a40:2"}, "old": {"partition": "b"}}
    new, old = asked(components, cluster(**slurm), plan(2, 2))
    assert "gpus-per-node" not in new.options and old.options["gpus-per-node"] == "2"


def test_pools_of_a_plan_keep_their_names_and_numbers():
    """Two ZP groups, whose third expert rank is on the new pool."""
    parts = asked(components, cluster(old=PARTITIONS["old"], new=PARTITIONS["new"]),
                  plan(2, 6, ("new", "old", "old", "new"), groups=2))
    assert [(part.pool, part.nodes) for part in parts] == [("new", 2), ("old", 2)]
    with pytest.raises(UsageError, match="ranks on pool newer, and the cluster has new, old"):
        asked(components, cluster(**PARTITIONS), plan(1, 1, ("newer", "old")))


def test_one_pool_is_one_component_without_a_name():
    (part,) = asked(components, cluster(new={}), plan(2, 2))
    assert part.pool == "" and part.nodes == 2
    assert asked(one_component, cluster(new={}), plan(2, 2)) == (part, "")


def test_slurm_must_know_which_nodes_are_of_a_pool():
    with pytest.raises(UsageError, match="nothing tells Slurm which nodes are of pool new and which of old"):
        asked(components, cluster(new={}, old={}), plan(2, 2))


def test_what_a_pool_does_not_have():
    with pytest.raises(UsageError, match="5 ranks on pool new, which has 4 GPUs"):
        asked(components, cluster(**PARTITIONS), plan(5, 2))
    with pytest.raises(UsageError, match="3 pools, and no plan says who uses which"):
        asked(components, cluster(**PARTITIONS, third={}), plan(2, 2))


def test_one_component_over_features():
    part, patterns = asked(one_component, cluster(**FEATURES), plan(4, 2))
    assert part.options == {"ntasks-per-node": "2", "gpus-per-node": "2", "nodes": "3", "constraint": "[a40*2&v100*1]"}
    assert patterns == "attention=a40 expert=v100"


def test_one_component_by_kind_of_gpu():
    part, patterns = asked(one_component, cluster(new={}, old={}), plan(2, 2))
    assert "constraint" not in part.options and patterns == "attention=A40 expert=V100"


@pytest.mark.parametrize("slurm, ranks, said", [
    (PARTITIONS, (2, 2), "pools differ in partition"),
    (FEATURES, (2, 1), "pools differ in gpus-per-node, ntasks-per-node"),
    (FEATURES, (3, 3), "the last node of a pool has fewer"),
    ({"new": {"constraint": "a40|a10"}, "old": {"constraint": "v100"}}, (2, 2), "must be one feature"),
    ({"new": {"constraint": "a40"}, "old": {}}, (2, 2), "must be one feature"),
    ({"new": {"constraint": "x"}, "old": {"constraint": "x"}}, (2, 2), "nothing tells nodes"),
])
def test_what_one_component_cannot_hold(slurm, ranks, said):
    with pytest.raises(UsageError, match=said):
        asked(one_component, cluster(**slurm), plan(*ranks))


@pytest.mark.parametrize("entry, said", [
    ([1], "is not a mapping"), ({"Partition": "a"}, "no long option"), ({"nodes": 2}, "decided by the layout"),
    ({"time": 86400}, "with quotes"), ({"comment": "a\nb"}, "text on one line"), ({"mem": 1.5}, "text on one line"),
    ({"exclusive": False}, "true for an option without a value"), ({3: "a"}, "no long option"),
])
def test_options_that_cannot_be(entry, said):
    problems = Problems()
    slurm_options(entry, "c.yaml, pool new", problems)
    with pytest.raises(UsageError, match=f"c.yaml, pool new.*{said}"):
        problems.raise_if_any()


def test_options_as_text():
    problems = Problems()
    assert slurm_options({"partition": "a", "mem": 0, "exclusive": True}, "c", problems) == {
        "partition": "a", "mem": "0", "exclusive": ""}
    assert slurm_options(None, "c", problems) == {} and not problems
