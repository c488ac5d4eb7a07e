"""transformer-engine on some ranks, which a stand-in by torch's operators is here: against stock Megatron with the same.

``tests/gpu/test_gpu_engine.py`` has the real one.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine_server import EngineServer
from models import tiny
from parity_cases import REL, placement_file
from ranks import Run, assert_same_steps

LEFT = "stand-in: a layer leaves gradients of its weights"
MODEL = {"transformer_impl": "transformer_engine", "train_iters": 10}
MIXED = {1: {"a0": [0, 5], "e0": [1, 2, 3], "e1": [4, 6, 7]}, 2: {"a1": [2], "e1": [0, 1, "3-7"]}}


class Engine:
    """Runs of one model from one checkpoint of stock Megatron's, with transformer-engine on all its ranks."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.server = EngineServer(folder)
        self.train(1, [0], train_iters=1, save=folder / "weights", save_interval=1, no_save_optim=True, no_save_rng=True)
        self.stock = self.train(2, [0, 1], **self.from_weights).steps[0]

    @property
    def from_weights(self) -> dict[str, object]:
        """Flags."""
        return {"load": self.folder / "weights", "finetune": True, "no_load_optim": True, "no_load_rng": True}

    def train(self, world: int, engine: list[int], hetermoe: list[str] | None = None, **model: object) -> Run:
        """A run whose ranks ``engine`` alone have transformer-engine."""
        return self.server.run([*(hetermoe or []), *tiny(**{**MODEL, **model})], world, engine).check()

    def disaggregated(self, engine: list[int], hetermoe: list[str], **model: object) -> Run:
        """Two attention and two expert ranks."""
        layout = ["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "2"]
        return self.train(4, engine, [*layout, *hetermoe], **{**self.from_weights, **model})


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    runs = Engine(tmp_path_factory.mktemp("engine"))
    yield runs
    runs.server.end()


def implementation(run: Run) -> str:
    """Of the experts, as the run's first rank says."""
    [line] = [line for line in run.output[0].splitlines() if line.startswith("hetermoe plan: ")]
    return json.loads(line.removeprefix("hetermoe plan: "))["expert_impl"]


@pytest.mark.parametrize(
    "ranks, impl", [([0, 1], "local"), pytest.param([0, 1, 3], "local", marks=pytest.mark.slow),
                    pytest.param([0, 1, 2, 3], "transformer_engine", marks=pytest.mark.slow)])
def test_experts_are_as_all_of_their_ranks_can(engine, ranks, impl):
    """A rank without transformer-engine makes experts torch's everywhere, on attention ranks too."""
    placement = placement_file(engine, experts=8, layers=MIXED)
    run = engine.disaggregated(ranks, ["--hetermoe-placement", placement])
    assert implementation(run) == impl
    for steps in run.steps:
        assert_same_steps(steps, engine.stock, rel=REL)


@pytest.mark.slow
def test_experts_alone(engine, parity):
    """Dense parts of torch, experts of transformer-engine."""
    flags = parity.flags(train_iters=MODEL["train_iters"])
    run = engine.server.run(
        ["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "1", "--hetermoe-expert-impl",
         "transformer_engine", *flags], 3, [2]).check()
    assert implementation(run) == "transformer_engine"
    assert_same_steps(run.steps[0], parity.stock(2, train_iters=MODEL["train_iters"]).steps[0], rel=REL)


@pytest.mark.slow
@pytest.mark.parametrize("distributed", [False, True])
def test_a_checkpoint_does_not_know(engine, tmp_path, distributed):
    """Saved with torch's experts: a resume is bit-equal, and goes on with transformer-engine's, and in stock Megatron."""
    flags = {"use_distributed_optimizer": distributed, "dist_ckpt_optim_fully_reshardable": distributed}
    whole = engine.disaggregated([0, 1], [], save=tmp_path, save_interval=5, **flags).steps[0]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    resumed = {"load": tmp_path, "finetune": False, "no_load_optim": False, "no_load_rng": False, **flags}
    assert_same_steps(engine.disaggregated([0, 1], [], **resumed).steps[0], whole[5:])
    assert_same_steps(engine.disaggregated([0, 1, 2, 3], [], **resumed).steps[0], whole[5:], rel=REL)
    stock = engine.train(2, [0, 1], **resumed, expert_model_parallel_size=2)
    assert_same_steps(stock.steps[0], whole[5:], rel=REL)


@pytest.mark.parametrize(
    "ranks, hetermoe, model",
    [([0, 1], ["--hetermoe-weight-gradients", "delayed"],
      {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 2000,
       "add_qkv_bias": True}),
     pytest.param([0, 1, 2, 3], ["--hetermoe-weight-gradients", "delayed", "--hetermoe-wave", "2"],
                  {"moe_shared_expert_intermediate_size": 32, "recompute_granularity": "full",
                   "recompute_method": "uniform", "recompute_num_layers": 1}, marks=pytest.mark.slow),
     pytest.param([0, 1], ["--hetermoe-weight-gradients", "merged"], {}, marks=pytest.mark.slow)],
    ids=["dense", "experts too", "merged"])
def test_gradients_of_weights_later(engine, ranks, hetermoe, model):
    """As together, which is compared with stock Megatron above. These models have other parameters, from the seed."""
    model = {**model, "load": None, "finetune": None}
    later, together = (engine.disaggregated(ranks, flags, **model) for flags in (hetermoe, []))
    says = [LEFT in output for output in later.output]
    assert says == ([False] * 4 if "merged" in hetermoe else [rank in ranks for rank in range(4)])
    for steps, others in zip(later.steps, together.steps, strict=True):
        assert_same_steps(steps, others, rel=REL if "merged" in hetermoe else 0.0)


def test_where_it_cannot_be(engine):
    """All ranks that lack it are named before any process group exists."""
    layout = ["--hetermoe", "--hetermoe-attention-ranks", "1", "--hetermoe-expert-ranks", "1",
              "--hetermoe-expert-impl", "transformer_engine"]
    run = engine.server.run([*layout, *tiny(**MODEL)], 2, [9])
    assert run.exit_codes == [2, 2]
    assert "--transformer-impl transformer_engine cannot be on attention rank 0: its GPU has compute capability 7.0" in run.output[0]
    assert "--hetermoe-expert-impl transformer_engine cannot be on rank 1: its GPU" in run.output[0]
