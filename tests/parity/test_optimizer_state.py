"""A run goes on with its optimizer's state in any other layout, and between disaggregated and stock Megatron."""

from __future__ import annotations

import pytest
from models import tiny
from parity_cases import placement_file
from ranks import Step, assert_same_steps, run_ranks

VARIANTS = {
    "adam": {},
    "distributed-adam": {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True},
    "fp16-adam": {"fp16": True, "loss_scale": 1024, "lr": 1e-3},
    "fp16-distributed-adam": {
        "fp16": True, "initial_loss_scale": 2.0**16, "use_distributed_optimizer": True, "overlap_grad_reduce": True,
        "dist_ckpt_optim_fully_reshardable": True, "overlap_param_gather": True, "lr": 1e-3,
    },
}
SLOW = {"adam", "fp16-adam", "fp16-distributed-adam"}


class Journey:
    """Runs that continue one another, each in a layout of its own.

    Args:
        folder: for the checkpoints.
        flags: of all of them.
    """

    def __init__(self, folder, **flags):
        self.folder, self.flags = folder, {"train_iters": 12, "global_batch_size": 4, "lr": 1e-2, **flags}

    def whole(self, layout: tuple[list[str], int]) -> list[Step]:
        """Twelve steps without a break."""
        words, world = layout
        return run_ranks([*words, *tiny(**self.flags)], world, cwd=self.folder).check().steps[0]

    def leg(self, source: str | None, layout: tuple[list[str], int], target: str, until: int) -> list[Step]:
        """Goes on from a checkpoint, if one is named, until a step, and saves. The last rank knows the loss in any layout."""
        words, world = layout
        load = {"load": self.folder / source} if source else {}
        flags = tiny(**self.flags, **load, save_interval=100, save=self.folder / target, exit_interval=until)
        return run_ranks([*words, *flags], world, cwd=self.folder).check().steps[-1]


def disaggregated(m: int, n: int, g: int = 1, *more: str) -> tuple[list[str], int]:
    words = ["--hetermoe", "--hetermoe-attention-ranks", str(m * g), "--hetermoe-expert-ranks", str(n * g)]
    return [*words, "--hetermoe-groups", str(g), *more], (m + n) * g


def stock(world: int, expert_parallel: int, *more: str) -> tuple[list[str], int]:
    return ["--expert-model-parallel-size", str(expert_parallel), *more], world


@pytest.fixture
def uneven(parity) -> tuple[list[str], int]:
    """One attention rank, which holds an expert of layer 2, and two expert ranks, one without experts of layer 1."""
    layers = {1: {"e0": ["0-7"]}, 2: {"a0": [0], "e0": ["1-4"], "e1": ["5-7"]}}
    return disaggregated(1, 2, 1, "--hetermoe-placement", placement_file(parity, experts=8, layers=layers))


def variants():
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in VARIANTS]


@pytest.mark.parametrize("variant", variants())
def test_from_layout_to_layout_to_stock_and_back(tmp_path, uneven, variant):
    """The losses are those of a run without a break, wherever it goes on."""
    journey = Journey(tmp_path, **VARIANTS[variant])
    rel = 1e-5 if "fp16" not in variant else 1e-3
    expected = journey.whole(disaggregated(2, 2))
    journey.leg(None, disaggregated(2, 2), "start", 3)
    legs = [
        ("start", uneven, "uneven", 6), ("uneven", disaggregated(1, 1, 2), "groups", 9),
        ("groups", stock(2, 2), "stock", 12), ("start", stock(4, 4), "wide", 6), ("wide", uneven, "back", 9),
    ]
    for source, layout, target, until in legs:
        steps = journey.leg(source, layout, target, until)
        assert_same_steps(steps, expected[until - 3:until], rel=rel)


@pytest.mark.parametrize("variant", variants())
def test_from_stock_without_expert_parallelism(tmp_path, uneven, variant):
    """There one optimizer has all parameters; here dense and experts' have one each."""
    journey = Journey(tmp_path, **VARIANTS[variant])
    rel = 1e-5 if "fp16" not in variant else 1e-3
    expected = journey.whole(stock(2, 1))
    journey.leg(None, stock(2, 1), "start", 3)
    assert_same_steps(journey.leg("start", uneven, "ours", 6), expected[3:6], rel=rel)
    assert_same_steps(journey.leg("ours", stock(2, 2), "stock", 9), expected[6:9], rel=rel)


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow] if name != "distributed-adam" else []) for name in VARIANTS]
)
def test_between_tensor_parallel_sizes(tmp_path, variant):
    """From whole to split attention and experts, to stock Megatron, and to whole ones with split sequences."""
    journey = Journey(tmp_path, **VARIANTS[variant])
    rel = 1e-5 if "fp16" not in variant else 1e-3
    tensor = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-tensor-parallel-size"]
    expected = journey.whole(disaggregated(2, 2))
    legs = [
        (None, disaggregated(2, 2), "start", 3), ("start", disaggregated(2, 2, 1, *tensor, "2"), "split", 6),
        ("split", stock(2, 2, *tensor, "1"), "stock", 9), ("stock", disaggregated(2, 2, 1, "--context-parallel-size", "2"), "whole", 12),
    ]
    for source, layout, target, until in legs:
        steps = journey.leg(source, layout, target, until)
        assert_same_steps(steps, expected[until - 3:until], rel=rel)


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow] if name != "distributed-adam" else []) for name in VARIANTS]
)
def test_between_pipeline_stages(tmp_path, variant):
    """From one stage to two, to one and to stock Megatron's two, and to uneven ones of another size."""
    journey = Journey(tmp_path, num_layers=3, **VARIANTS[variant])
    rel = 1e-5 if "fp16" not in variant else 1e-3
    first_two = ["--pipeline-model-parallel-size", "2", "--decoder-first-pipeline-num-layers", "2"]
    last_two = ["--pipeline-model-parallel-size", "2", "--decoder-last-pipeline-num-layers", "2"]
    expected = journey.whole(disaggregated(1, 1))  # from other weights than a pipeline's, which draws them by stage
    legs = [
        (None, disaggregated(1, 1), "start", 3), ("start", disaggregated(2, 2, 1, *first_two, "--hetermoe-wave", "1"), "two", 6),
        ("two", disaggregated(1, 1), "one", 9), ("two", stock(4, 2, *last_two), "stock", 9),
        ("stock", disaggregated(2, 2, 1, *last_two), "uneven", 12),
    ]
    for source, layout, target, until in legs:
        steps = journey.leg(source, layout, target, until)
        assert_same_steps(steps, expected[until - 3:until], rel=rel)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["adam", "distributed-adam"])
def test_with_layers_that_predict_further_tokens(tmp_path, parity, variant):
    """From stock Megatron to uneven experts, back, and to two pipeline stages."""
    journey = Journey(tmp_path, mtp_num_layers=2, **VARIANTS[variant])
    layers = {"all": {"e0": ["0-4"], "e1": ["5-7"]}, 3: {"a0": [0, 5], "e0": [1, 2, 3, 4, 6, 7]}}
    uneven = disaggregated(1, 2, 1, "--hetermoe-placement", placement_file(parity, experts=8, layers=layers))
    expected = journey.whole(stock(2, 2))
    legs = [
        (None, stock(2, 2), "start", 3), ("start", uneven, "uneven", 6), ("uneven", stock(2, 2), "stock", 9),
        ("stock", disaggregated(2, 2, 1, "--pipeline-model-parallel-size", "2"), "stages", 12),
        ("uneven", disaggregated(2, 2), "even", 9),
    ]
    for source, layout, target, until in legs:
        steps = journey.leg(source, layout, target, until)
        assert_same_steps(steps, expected[until - 3:until], rel=1e-5)


@pytest.mark.slow
def test_to_a_stage_without_experts_and_back(tmp_path):
    journey = Journey(tmp_path, num_layers=3, moe_layer_freq="([0,1,1])", **VARIANTS["distributed-adam"])
    dense_first = ["--pipeline-model-parallel-size", "2", "--pipeline-model-parallel-layout", "Et|ttL", "--hetermoe-wave", "1"]
    expected = journey.whole(disaggregated(1, 1))
    legs = [
        (None, disaggregated(1, 1), "start", 3), ("start", disaggregated(2, 2, 1, *dense_first), "two", 6),
        ("two", disaggregated(2, 2, 1, *dense_first), "again", 9), ("again", disaggregated(1, 1), "one", 12),
    ]
    for source, layout, target, until in legs:
        steps = journey.leg(source, layout, target, until)
        assert_same_steps(steps, expected[until - 3:until], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["adam", "distributed-adam"])
def test_between_virtual_stages(tmp_path, variant):
    """From one stage to two of two chunks, on in them, to stock Megatron's, and back to one."""
    journey = Journey(tmp_path, num_layers=4, **VARIANTS[variant])
    chunks = ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"]
    ours = disaggregated(2, 2, 1, *chunks, "--hetermoe-wave", "1")
    expected = journey.whole(disaggregated(1, 1))
    legs = [
        (None, disaggregated(1, 1), "start", 3), ("start", ours, "chunks", 6), ("chunks", ours, "again", 9),
        ("chunks", stock(4, 2, *chunks), "stock", 9), ("stock", ours, "back", 12), ("again", disaggregated(1, 1), "one", 12),
    ]
    for source, layout, target, until in legs:
        steps = journey.leg(source, layout, target, until)
        assert_same_steps(steps, expected[until - 3:until], rel=1e-5)
