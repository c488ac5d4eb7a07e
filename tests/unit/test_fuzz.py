"""Whatever is in flags, plan, placement, cluster and profile files: the outcome is a value or a UsageError."""

from __future__ import annotations

import dataclasses
import json

import pricing
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shapes import shape

from megatron_hetermoe.cli import main as command
from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.flags import Flags, parse_flags
from megatron_hetermoe.config.plan import Plan, plan_from_json
from megatron_hetermoe.config.recipe import parse_recipe
from megatron_hetermoe.config.step import Step
from megatron_hetermoe.cost.cluster import cluster_from_document, read_cluster
from megatron_hetermoe.cost.curves import Notes
from megatron_hetermoe.cost.profile import Profiled, read_profile
from megatron_hetermoe.planner.resolve import resolve
from megatron_hetermoe.topology.layout import Layout
from megatron_hetermoe.topology.placement import Placement, even_placement, placement_from_document

SHAPE = shape(experts=4)
LAYOUT = Layout(2, 2)
PLAN = Plan(SHAPE, 2, 2, 1, even_placement(SHAPE, LAYOUT).holders)

FLAGS = ["--hetermoe", *(f"--hetermoe-{field.name.replace('_', '-')}" for field in dataclasses.fields(Flags)[1:])]
numbers = st.one_of(st.integers(-3, 9), st.integers(), st.sampled_from([2**31, 2**63, 10**400]))
words = st.one_of(
    st.sampled_from([*FLAGS, "--", "=", "--lr", "-1", "0", "1", "2", "zebra", "sequential", "/", ".", "/dev/null"]),
    st.text(max_size=8), numbers.map(str), st.builds("{}={}".format, st.sampled_from(FLAGS), st.text(max_size=5)),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, st.floats(), st.text(max_size=6))
ranges = st.one_of(
    numbers, st.builds("{}-{}".format, numbers, numbers),
    st.sampled_from(["0-99999999999", "3-0", "-", "٣", "²", "1-²", "9" * 5000]),
    scalars,
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
keys = st.one_of(
    st.sampled_from(["all", "1", "2", "3", "²", 1, 2, 3, None, True, 1.5, (1, 2), "٢", "9" * 5000]), numbers
)
names = st.sampled_from(["a0", "a1", "e0", "e1", "e2", "", 0, None, True])
entries = st.dictionaries(names, st.one_of(st.lists(ranges, max_size=4), ranges), max_size=4) | anything
placements = st.one_of(
    anything,
    st.fixed_dictionaries(
        {"experts": st.just(4) | scalars, "layers": st.dictionaries(keys, entries, max_size=4) | anything},
        optional={"extra": anything, 3: anything},
    ),
)


@st.composite
def plans(draw):
    """A good plan with some of its values replaced, left out or added."""
    document = json.loads(PLAN.to_json())
    for _ in range(draw(st.integers(0, 4))):
        target = document["model"] if isinstance(document.get("model"), dict) and draw(st.booleans()) else document
        name = draw(st.sampled_from([*PLAN.__dataclass_fields__, *SHAPE.__dataclass_fields__, "format", "other"]))
        if draw(st.booleans()):
            target.pop(name, None)
        else:
            target[name] = draw(st.one_of(anything, st.lists(st.lists(numbers, max_size=5), max_size=3)))
    return document


def outcome(call):
    """The value, or None after a UsageError whose message is a text."""
    try:
        return call()
    except UsageError as error:
        assert error.message().startswith("hetermoe: ")
        return None


def check_flags(argv):
    problems = Problems()
    flags, rest = parse_flags(argv, problems)
    assert isinstance(flags, Flags) and len(rest) <= len(argv)
    if not problems and flags.enabled:
        for name in ("attention_ranks", "expert_ranks", "groups", "wave", "stall_timeout"):
            assert getattr(flags, name) is None or getattr(flags, name) > 0
        plan = resolve(flags, SHAPE, "fp32", 4, problems)
        assert (plan is None) == bool(problems)
    outcome(problems.raise_if_any)


def check_plan(document):
    plan = outcome(lambda: plan_from_json(json.dumps(document), "p.json"))
    if plan is not None:
        assert plan == plan_from_json(plan.to_json(), "p.json")


def check_resolved(folder, document):
    path = folder / "plan.json"
    path.write_text(json.dumps(document))
    problems = Problems()
    plan = resolve(Flags(enabled=True, plan=str(path)), SHAPE, "fp32", 4, problems)
    assert (plan is None) == bool(problems)
    if plan is not None:
        Placement(plan.placement, 4)
        assert plan.model == SHAPE and plan.schedule in ("zebra", "sequential") and (plan.wave is None or plan.wave > 0)


LINK = {"gb_per_s": 10, "latency_us": 10}
POOL = {"kind": "A40", "nodes": 1, "gpus_per_node": 2, "memory_gb": 48, "intra_node": LINK, "inter_node": LINK}
CLUSTER = {"pools": {"new": POOL, "old": {**POOL, "kind": "V100-SXM2", "memory_gb": 16}}}
PROFILE = json.loads(pricing.profile(SHAPE, memory={"overhead": 1e9}, optimizer=1e-9).to_json())
PRICED = json.loads(dataclasses.replace(
    PLAN, pools=("new", "new", "old", "old"), step=Step(1, 4, 100)).to_json())


@st.composite
def changed(draw, document):
    """A document with some values, at any depth, replaced, left out or added."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(0, 3))):
        target = document
        while (inner := [value for value in target.values() if isinstance(value, dict) and value]) and draw(st.booleans()):
            target = draw(st.sampled_from(inner))
        name = draw(st.sampled_from([*target, "other", "channel", "memory", 3, None]))
        if draw(st.integers(0, 3)):
            target[name] = draw(anything)
        else:
            target.pop(name, None)
        if not target:
            break
    return document


def check_cluster(document):
    found = outcome(lambda: cluster_from_document(document, "c.yaml"))
    if found is not None:
        assert all(pool.gpus > 0 and pool.memory > 0 and pool.inter.bandwidth > 0 for pool in found.pools.values())


def check_cluster_file(folder, text):
    path = folder / "cluster.yaml"
    path.write_bytes(text)
    outcome(lambda: read_cluster(path))


def check_profile(folder, document):
    path = folder / "profile.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    found = outcome(lambda: read_profile(path))
    kind = found and outcome(lambda: Profiled(found, SHAPE, pricing.PRECISION, Notes()))
    if kind:
        assert min(kind.attention(32, "none")) > 0 and min(kind.expert(8.0, "full")) > 0


def check_priced_plan(folder, document):
    (folder / "plan.json").write_text(json.dumps(document))
    (folder / "cluster.yaml").write_text(json.dumps(CLUSTER))
    words = ["simulate", str(folder / "plan.json"), "--cluster", str(folder / "cluster.yaml"), "--json"]
    assert command.main(words) in (0, 2)


def check_text(text):
    outcome(lambda: plan_from_json(text, "p.json"))
    outcome(lambda: parse_recipe(text, "r.yaml", {}))


def check_placement(document):
    placement = outcome(lambda: placement_from_document(document, SHAPE, LAYOUT, "p.yaml"))
    if placement is not None:
        assert [len(layer) for layer in placement.holders] == [4, 4]


def check_placement_file(folder, text):
    path = folder / "placement.yaml"
    path.write_bytes(text)
    problems = Problems()
    flags = Flags(enabled=True, attention_ranks=2, expert_ranks=2, placement=str(path))
    assert (resolve(flags, SHAPE, "fp32", 4, problems) is None) == bool(problems)


broken = st.one_of(
    st.text(max_size=60), st.sampled_from(["[" * 5000, "{" * 5000, "9" * 5000, "pools: {a: 2001-99-99}"]),
    st.text("{}[]:,-&*!\"' \n\t#|>%@`019ae", max_size=40),
)
texts = st.one_of(broken, plans().map(json.dumps), plans().map(yaml.safe_dump))
TARGETS = {
    "flags": (check_flags, st.lists(words, max_size=8)),
    "plan": (check_plan, plans() | anything),
    "text": (check_text, texts),
    "placement": (check_placement, placements),
    "cluster": (check_cluster, changed(CLUSTER) | anything | st.dictionaries(scalars, anything, max_size=3)),
}
FILES = {
    "cluster-file": (check_cluster_file, broken.map(lambda text: text.encode("utf-8", "replace")) | st.binary(max_size=40)),
    "profile-file": (check_profile, changed(PROFILE) | texts),
    "priced-plan": (check_priced_plan, changed(PRICED)),
    "plan-file": (check_resolved, plans()),
    "placement-file": (
        check_placement_file, st.binary(max_size=40) | texts.map(lambda text: text.encode("utf-8", "replace"))
    ),
}


def fuzz(check, strategy, examples):
    settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))(given(strategy)(check))()


@pytest.mark.parametrize("target", [*TARGETS, *FILES])
@pytest.mark.parametrize("examples", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_value_or_a_usage_error(tmp_path, target, examples):
    if target in TARGETS:
        check, strategy = TARGETS[target]
        fuzz(lambda value: check(value), strategy, examples)
    else:
        check, strategy = FILES[target]
        fuzz(lambda value: check(tmp_path, value), strategy, examples)
