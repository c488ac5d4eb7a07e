#!/usr/bin/env python3
"""The paper's experiments (arXiv 2504.03871) beside what the simulator says of them.

Reads the paper's facts (``--facts``, hetermoe.yaml). The microbenchmark and the utilisation table calibrate what share
of a data sheet each GPU reaches and the assumed microbatches; everything else is predicted. What the paper does not say
is assumed, printed, and varied one by one, with how far the predictions move.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
import yaml

from megatron_hetermoe.config.shape import ModelShape
from megatron_hetermoe.config.step import Step
from megatron_hetermoe.cost.cluster import Cluster, ClusterPool, Link
from megatron_hetermoe.cost.curves import Notes
from megatron_hetermoe.cost.devices import device_table
from megatron_hetermoe.cost.estimate import Efficiency, Estimate
from megatron_hetermoe.cost.group import GroupCosts, seats_of
from megatron_hetermoe.planner.asym_ea import Limits, balance, counts_of, gather_and_squeeze, long_step_seconds
from megatron_hetermoe.simulator.baselines import expert_parallel_seconds, ideal_seconds, pipeline, spread

ROWS = {"V100-16GB": "V100-SXM2"}  # the paper's names of what the device table calls otherwise
PRECISION = "fp16"
LENGTHS = (4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class Assumptions:
    """What the paper leaves open.

    Attributes:
        microbatches: of an attention rank in a step, of one sequence each.
        gpus_per_node: that share the network's bandwidth.
        head_dim: width of an attention head.
        query_groups: key-value heads.
        ffn: width inside an expert, in hidden sizes.
        vocabulary: rows of the output layer.
        recompute: activation recomputation.
        even_share: with all experts on expert ranks, DistEP; False gives it the placement of Asym-EA too.
    """

    microbatches: int = 8
    gpus_per_node: int = 1
    head_dim: int = 64
    query_groups: int = 8
    ffn: float = 3.5
    vocabulary: int = 32_000
    recompute: str = "full"
    even_share: bool = True


VARIED = {
    "microbatches": (4, 16), "gpus_per_node": (2, 3), "head_dim": (128,), "query_groups": (16,), "ffn": (4.0,),
    "vocabulary": (50_304,), "recompute": ("none",), "even_share": (False,),
}


class Paper:
    """Facts, assumptions and calibration."""

    def __init__(self, facts: dict, assumed: Assumptions, efficiency: dict[str, Efficiency]):
        self.facts, self.assumed, self.efficiency = facts, assumed, efficiency

    def shape(self, model: str, length: int) -> ModelShape:
        row = self.facts["models"][model]
        ffn = int(self.assumed.ffn * row["hidden"])
        heads = row["hidden"] // self.assumed.head_dim
        return ModelShape(
            row["layers"], tuple(range(1, row["layers"] + 1)), row["experts"], 2, row["hidden"], ffn, ffn, 0, True,
            heads, min(heads, self.assumed.query_groups), self.assumed.head_dim, False, length)

    def case(self, model: str, setup: str, length: int) -> Case:
        row = self.facts["setups"][setup]
        return self.of(model, length, [(row[role]["gpu"], row[role]["count"]) for role in ("attention", "expert")],
                       row["network_gbps"])

    def of(self, model: str, length: int, gpus: list[tuple[str, int]], gbps: float) -> Case:
        shape, pools, kinds, members = self.shape(model, length), {}, {}, []
        for index, (gpu, count) in enumerate(gpus):
            name, row = f"{gpu}#{index}", ROWS.get(gpu, gpu)
            link = Link(gbps / 8 * 1e9, 2e-5)
            intra = Link(20e9, 1e-5)
            pools[name] = ClusterPool(name, row, count, self.assumed.gpus_per_node, 1e12, intra, link)
            kinds[name] = Estimate(device_table()[row], shape, Notes(), self.efficiency[row])
            members += [name] * count
        step = Step(1, self.assumed.microbatches, self.assumed.vocabulary, self.assumed.recompute)
        seats = seats_of(members, Cluster(pools), kinds)
        return Case(GroupCosts(shape, step, seats, gpus[0][1], 1, PRECISION), self.assumed)


@dataclass(frozen=True)
class Case:
    """One model on one set-up at one length."""

    group: GroupCosts
    assumed: Assumptions

    @cached_property
    def even(self) -> np.ndarray:
        return counts_of(spread(self.group, range(self.group.attention_members, self.group.members)))[0]

    @cached_property
    def paper_placement(self) -> np.ndarray:
        return gather_and_squeeze(self.group, Limits((10**9,) * self.group.members))

    def zebra(self, experts: np.ndarray, wave: int | None = None) -> float:
        return float(long_step_seconds(self.group, np.array([experts], float), wave)[0])

    @cached_property
    def hetermoe(self) -> float:
        """The better of the paper's placement and none moved: its planner would not choose what is slower."""
        return min(self.zebra(self.paper_placement), self.zebra(self.even))

    @cached_property
    def expert_parallel(self) -> float:
        return expert_parallel_seconds(self.group)

    @cached_property
    def ideal(self) -> float:
        return ideal_seconds(self.group)

    @cached_property
    def naive(self) -> float:
        return self.zebra(self.even if self.assumed.even_share else self.paper_placement, 1)

    @cached_property
    def pipeline(self) -> float:
        return pipeline(self.group).seconds

    @property
    def asym_ea(self) -> float:
        return self.zebra(self.even) / self.hetermoe

    def busy(self, experts: np.ndarray) -> tuple[float, float]:
        """Share of the step that the first attention and the first expert rank compute."""
        group, seconds = self.group, self.zebra(experts)
        work = [sum(group.expert[member]) * experts[:, member].sum() + (sum(map(sum, group.attention[member]))
                if member < group.attention_members else 0) for member in (0, group.attention_members)]
        return tuple(float(one) * group.step.microbatches / seconds for one in work)


# ---- calibration

def efficiencies(facts: dict, flash: float, bandwidth: float) -> dict[str, Efficiency]:
    """Shares for which the microbenchmark comes out, given those of the newer GPUs."""
    bench = facts["microbenchmark"]
    shape = ModelShape(32, tuple(range(1, 33)), 8, 2, 4096, 14336, 14336, 0, True, 32, 8, 128, False, 65536)
    result = {}
    for new, old, ratio in (("A40", "V100-SXM2", "A40_over_V100"), ("L40S", "T4", "L40S_over_T4")):
        table = device_table()
        result[new] = Efficiency(flash=flash, bandwidth=bandwidth)
        matmul = result[new].matmul * table[new].flops / table[old].flops / bench["experts"][ratio]
        target = bench["attention"][ratio][65536]
        fast = sum(Estimate(table[new], shape, Notes(), result[new]).attention(65536, "none"))
        low, high = 0.005, 1.0
        for _ in range(40):  # the time falls as the share grows
            plain = (low * high) ** 0.5
            old_share = Efficiency(matmul=matmul, plain=plain, bandwidth=bandwidth)
            slow = sum(Estimate(table[old], shape, Notes(), old_share).attention(65536, "none"))
            low, high = (plain, high) if slow / fast > target else (low, plain)
        result[old] = Efficiency(matmul=matmul, plain=plain, bandwidth=bandwidth)
    return result


def utilisation_errors(paper: Paper) -> list[tuple[str, float, float]]:
    """(what, the paper's, ours) for the utilisation table."""
    rows = []
    for length, row in paper.facts["results"]["utilisation_of_Mixtral-D1_on_O1"].items():
        case = paper.case("Mixtral-D1", "O1", length)
        for name, experts in (("without_Asym-EA", case.even), ("with_Asym-EA", case.paper_placement)):
            for gpu, ours in zip(("A40", "V100"), case.busy(experts)):
                rows.append((f"{gpu} busy {name} at {length}", row[name][gpu], ours))
    return rows


# Shares of flash attention and of memory bandwidth, microbatches.
_GRID = ((0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), (0.4, 0.55, 0.7, 0.85), (2, 3, 4, 6, 8, 12))


def calibrated(facts: dict) -> tuple[Assumptions, dict[str, Efficiency]]:
    """The shares and microbatches that fit the utilisation table best, on a grid."""
    best = None
    for flash, bandwidth, microbatches in product(*_GRID):
        assumed, shares = Assumptions(microbatches=microbatches), efficiencies(facts, flash, bandwidth)
        errors = utilisation_errors(Paper(facts, assumed, shares))
        loss = sum((ours - theirs) ** 2 for _, theirs, ours in errors)
        if best is None or loss < best[0]:
            best = (loss, assumed, shares)
    return best[1], best[2]


# ---- predictions: what, the paper's figure, ours, whether model, set-up and length are all given

def predictions(paper: Paper) -> list[tuple[str, float, float, bool]]:
    facts = paper.facts["results"]
    known: dict[tuple, Case] = {}

    def case(model: str, setup: str, length: int) -> Case:
        return known.setdefault((model, setup, length), paper.case(model, setup, length))

    def average(ratio: Callable[[Case], float], lengths=LENGTHS, models=None, setups=None) -> float:
        return statistics.mean(ratio(case(model, setup, length)) for model in models or paper.facts["models"]
                               for setup in setups or paper.facts["setups"] for length in lengths)

    def over_ep(one: Case) -> float:
        return one.expert_parallel / one.hetermoe

    rows = []
    for length, theirs in facts["HeterMoE_over_EP"]["average"].items():
        rows.append((f"over EP, average at {length}", theirs, average(over_ep, (length,)), False))
    for length, theirs in facts["HeterMoE_over_EP"]["EP_over_HeterMoE_average"].items():
        ours = average(lambda one: 1 / over_ep(one), (length,))
        rows.append((f"EP over HeterMoE, average at {length}", theirs, ours, False))
    for model in ("Mixtral-D1", "Mixtral-D2"):
        for length, theirs in facts["HeterMoE_over_EP"][model].items():
            rows.append((f"over EP, {model} at {length}", theirs, average(over_ep, (length,), (model,)), False))
    naive = facts["DistEP_over_HeterMoE"]
    rows.append(("DistEP over HeterMoE, average", naive["average"],
                 average(lambda one: one.hetermoe / one.naive), False))
    for length, theirs in naive["by_length"].items():
        rows.append((f"DistEP over HeterMoE at {length}", theirs,
                     average(lambda one: one.hetermoe / one.naive, (length,)), False))
    ideal = facts["HeterMoE_over_EP_ideal"]
    rows.append(("over EP (Ideal), average", ideal["average"], average(lambda one: one.ideal / one.hetermoe), False))
    most = ideal["maximum"]
    one = case(most["model"], most["setup"], most["length"])
    rows.append((f"over EP (Ideal), {most['model']} on {most['setup']} at {most['length']}", most["value"],
                 one.ideal / one.hetermoe, True))
    pipe = facts["HeterMoE_over_pipeline_parallelism"]
    ratios = [one.pipeline / one.hetermoe for one in (case(*key) for key in product(
        paper.facts["models"], paper.facts["setups"], LENGTHS))]
    rows.append(("over pipelines, average", pipe["average"], statistics.mean(ratios), False))
    rows.append(("over pipelines, maximum", pipe["maximum"], max(ratios), False))
    at = [case(model, setup, 4096) for model, setup in product(paper.facts["models"], paper.facts["setups"])]
    short = [one.pipeline / one.hetermoe for one in at]
    for name, theirs, ours in zip(("least", "most"), pipe["at_4096"], (min(short), max(short))):
        rows.append((f"over pipelines at 4096, {name}", theirs, ours, False))
    gains = facts["Asym-EA_speedup_on_O1"]
    for model in ("Mixtral-W1", "Mixtral-D1"):
        for length, theirs in gains[model].items():
            rows.append((f"Asym-EA's gain, {model} on O1 at {length}", theirs, case(model, "O1", length).asym_ea, True))
    for model, theirs in gains["not_needed_above"].items():
        needed = [length for length in range(4096, 65537, 2048) if paper.case(model, "O1", length).paper_placement[
            :, 0].any()]
        rows.append((f"Asym-EA not needed above, {model} on O1, tokens", theirs, max(needed, default=0), True))
    same = [paper.of(model, length, [("A40", 2), ("V100-16GB", 2)], 100).hetermoe
            / paper.of(model, length, [("A40", 2), ("A40", 2)], 100).expert_parallel
            for model in paper.facts["models"] for length in LENGTHS]
    # The same tokens in each: two attention ranks' in the first, four ranks' in the second, which has two by name.
    rows.append(("2 A40 + 2 V100 over EP on 4 A40, average",
                 facts["homogeneous"]["HeterMoE_2xA40_2xV100_over_EP_4xA40_average"],
                 statistics.mean(1 / ratio for ratio in same), False))
    # The paper names no model here. D1 as it is has 24 experts, which divide by chunks of 12; with as many a GPU as on
    # O1 it has 14, which do not.
    for experts in (24, 14):
        uneven = four_to_three(paper, experts)
        rows.append((f"the paper's placement at 4:3, D1 with {experts} experts, 4096", 0.76,
                     uneven.ideal / uneven.hetermoe, False))
    return rows


def four_to_three(paper: Paper, experts: int) -> Case:
    """Mixtral-D1 with that many experts on 4 A40 and 3 V100, at 4096 tokens."""
    one = paper.of("Mixtral-D1", 4096, [("A40", 4), ("V100-16GB", 3)], 100)
    shape = replace(one.group.shape, experts=experts)
    return Case(replace(one.group, shape=shape), paper.assumed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=Path, required=True, help="the paper's facts, hetermoe.yaml")
    parser.add_argument("--no-sensitivity", action="store_true", help="leave out what each assumption moves")
    args = parser.parse_args()
    facts = yaml.safe_load(args.facts.read_text(encoding="utf-8"))
    assumed, shares = calibrated(facts)
    paper = Paper(facts, assumed, shares)
    print("Calibrated on microbenchmark and utilisation table; shares of the data sheet:")
    for name, share in shares.items():
        print(f"  {name:10} matrix products {share.matmul:.2f}, flash {share.flash:.2f}, other attention "
              f"{share.plain:.3f}, bandwidth {share.bandwidth:.2f}")
    print(f"Assumed: {assumed}; averages are over all models, set-ups and {LENGTHS}")
    print("\nfit (not a prediction)                                       paper   ours   error")
    for what, theirs, ours in utilisation_errors(paper):
        print(f"{what:60} {theirs:6.2f} {ours:6.2f} {ours / theirs - 1:+7.1%}")
    rows = predictions(paper)
    print("\nprediction (* model, set-up and length are given)            paper   ours   error")
    for what, theirs, ours, given in rows:
        print(f"{'* ' if given else '  '}{what:58} {theirs:6.5g} {ours:6.5g} {ours / theirs - 1:+7.1%}")
    for name, chosen in (("given", [row for row in rows if row[3]]), ("all", rows)):
        errors = [abs(ours / theirs - 1) for _, theirs, ours, _ in chosen]
        print(f"average error, {name}: {statistics.mean(errors):.1%}, median {statistics.median(errors):.1%}")
    for experts in (24, 14):
        four = four_to_three(paper, experts)
        better = balance(four.group, Limits((10**9,) * 7), None)
        print(f"ours at 4:3, D1 with {experts} experts at 4096, over EP (Ideal): {four.ideal / better.seconds:.3f}")
    if args.no_sensitivity:
        return
    print("\nassumption                average move of a prediction")
    for name, values in VARIED.items():
        for value in values:
            moved = predictions(Paper(facts, replace(assumed, **{name: value}), shares))
            moves = [abs(other[2] / row[2] - 1) for row, other in zip(rows, moved) if row[2]]
            print(f"{name + ' = ' + str(value):25} {statistics.mean(moves):.1%}", flush=True)


if __name__ == "__main__":
    main()
