"""The comparison's arithmetic: what is priced, read, judged and drawn of its cells. Training is another matter."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from pricing import group, profile, shape

from megatron_hetermoe.cost.cluster import read_cluster
from megatron_hetermoe.cost.curves import Notes
from megatron_hetermoe.simulator.baselines import expert_parallel_seconds, pipelines, spread, zebra_seconds

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


def modules(*names: str) -> SimpleNamespace:
    """Modules of the benchmarks."""
    sys.path.insert(0, str(BENCH))
    try:
        return SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(BENCH))


bench = modules("bound", "busy", "cells", "compare", "hosts", "measure", "prices", "systems", "throttle")


def cell(system="EP, all ranks", loss=(10.0, 9.0), seconds=1.0, **others) -> dict:
    return {"model": "D1", "length": 4096, "ranks": [2, 2], "batch": 8, "micro_batch": 1, "system": system, "repeat": 0, "predicted": 1.0,
            "seconds": seconds, "loss": list(loss), **others}


# ---- busy shares


def test_intervals_that_overlap_count_once():
    union = bench.busy.union
    assert union([]) == 0
    assert union([(0, 2), (5, 6)]) == 3
    assert union([(5, 6), (0, 4), (1, 2), (3, 5)]) == 6
    assert union([(0, 1), (0, 1), (1, 1)]) == 1


def test_kernels_that_move_data_are_apart():
    def event(name, start, length, category="kernel"):
        return {"ph": "X", "cat": category, "name": name, "ts": start * 1e6, "dur": length * 1e6}

    trace = {"traceEvents": [
        event("gemm", 0, 2), event("gemm", 1, 2), event("ncclDevKernel_SendRecv", 2, 4), event("cudaLaunchKernel", 0, 9, "cuda_runtime"),
        event("at::cuda::(anonymous namespace)::spin_kernel(long)", 5, 3), {"ph": "M", "name": "process_name"},
    ]}
    assert bench.busy.busy_seconds(bench.busy.kernels_of(trace)) == {"compute": 3.0, "nccl": 6.0}


def records(loss: float, *shares: float) -> list[list[dict]]:
    """What ranks write: their steps take longer by number, and in the profiled one they compute that share."""
    return [
        [*({"seconds": 1 + rank + step, "tasks": 0.5 + rank + step, "loss": loss, "memory": step} for step in range(9)),
         {"profiled": {"seconds": 2.0, "compute": 2 * share, "nccl": 0.2}}]
        for rank, share in enumerate(shares)
    ]


def test_a_step_is_as_long_as_on_the_slowest_rank():
    found = bench.measure.figures(records(9.5, 0.9, 0.8, 0.5), ("attention", "attention", "expert"))
    assert found["seconds"] == 1 + 2 + 6 and found["tasks"] == 0.5 + 2 + 6  # of steps 4 to 8, the sixth
    assert found["busy"]["kernels"] == pytest.approx({"attention": 0.85, "expert": 0.5})
    assert found["busy"]["nccl"] == pytest.approx({"attention": 0.1, "expert": 0.1})
    assert found["memory"] == [8, 8, 8]


@pytest.mark.parametrize("loss", [float("nan"), None])
def test_a_loss_that_is_no_number_is_no_figure(loss):
    assert "failed" in bench.measure.figures(records(loss, 1.0), ("fast",))


# ---- cells


def test_a_line_that_was_cut_off_is_measured_again(tmp_path):
    file = tmp_path / "cells.jsonl"
    assert bench.cells.read(file) == []
    bench.cells.append(file, cell())
    with file.open("a") as end:
        end.write('{"model": "D1", "len')
    assert bench.cells.read(file) == [cell()]
    bench.cells.append(file, cell("zebra"))
    assert [one["system"] for one in bench.cells.read(file)] == ["EP, all ranks", "zebra"]


def test_throttled_cells_are_others():
    assert bench.cells.key(cell()) == bench.cells.key(cell(gbps=None)) != bench.cells.key(cell(gbps=100.0))


def test_a_cell_with_another_loss_is_failed():
    near, far = cell("zebra", (10.02, 9.01)), cell("naive disaggregation", (10.02, 9.2))
    judged = bench.cells.compared([far, cell(), near, {**cell("zebra, planned"), "model": "W1"}])
    assert [one["system"] for one in judged if "failed" not in one] == ["EP, all ranks", "zebra", "zebra, planned"]
    [failed] = [one for one in judged if "failed" in one]
    assert "seconds" not in failed and "loss of step 2 is 9.2000, others have 9.0000" in failed["failed"]


def test_without_stock_the_median_is_right():
    judged = bench.cells.compared([cell("zebra"), cell("zebra, Asym-EA"), cell("zebra, planned", (10.0, 8.0))])
    assert [one["system"] for one in judged if "failed" in one] == ["zebra, planned"]


def test_the_table_has_medians_and_ratios():
    measured = [
        cell(seconds=2.0), cell("EP, fast pool alone", seconds=8 / 3), cell("EP, slow pool alone", seconds=8.0),
        *(cell("zebra", seconds=seconds, repeat=repeat, of_bound=0.9, over_ep_compute=1.1,
               busy={"profiled": {"attention": 0.95, "expert": 0.5}}) for repeat, seconds in enumerate((1.0, 1.25, 1.6))),
        cell("pipeline, best split", seconds=4.0, layout="1+1 stages of 2, layers 5+3"),
        {**{name: value for name, value in cell("naive disaggregation").items() if name != "seconds"}, "failed": "exit codes"},
    ]
    text = bench.cells.table(measured)
    assert "| D1 | 4096 | 2 fast, 2 slow | zebra | 6.40 | 5.00 to 8.00 | 8.00 | 1.60 | 1.60 | 0.90 | 1.10 | attention 95%, expert 50% |  |" \
        in text
    assert "pipeline, best split (1+1 stages of 2, layers 5+3) | 2.00" in text
    assert text.endswith("exit codes") and "naive" in text.splitlines()[-1]


# ---- prices


def test_the_bound_is_the_best_division_of_experts():
    """A of 9 ms on attention ranks (3 layers) and 24 experts: with 3 ms each on a slow and 1.5 ms on a fast rank's."""
    of = shape(layers=3, experts=8)
    priced = group(1, 1, of, new=profile(of, (1e-3, 2e-3), (1e-3, 2e-3)), old=profile(of, (1e-3, 2e-3), (2e-3, 4e-3)))
    fast, slow = (sum(priced.expert[member]) for member in (0, 1))
    assert slow == pytest.approx(2 * fast)
    attention = sum(map(sum, priced.attention[0]))
    best = min(max(attention + held * fast, (24 - held) * slow) for held in range(25))
    assert bench.bound.disaggregated(priced) == pytest.approx(best * priced.step.microbatches)


def test_the_bound_is_never_less_than_attention():
    of = shape()
    priced = group(2, 2, of, new=profile(of, attention=(1.0, 2.0)))
    assert bench.bound.disaggregated(priced) == pytest.approx(sum(map(sum, priced.attention[0])) * priced.step.microbatches)


def test_steps_are_longer_than_what_they_compute():
    of = shape(layers=4)
    priced = group(2, 2, of, microbatches=8, old=profile(of, (3e-3, 6e-3), (2e-4, 4e-4)))
    even = spread(priced, range(2, 4))
    assert bench.bound.disaggregated(priced) < zebra_seconds(priced, even)
    alone = bench.bound.expert_parallel(priced, batch=16)
    assert alone < expert_parallel_seconds(priced) < 1.5 * alone
    roles = bench.bound.by_role(priced, [[0, 0, 4, 4]] * 4)
    assert roles["expert"] == pytest.approx(8 * 4 * 4 * sum(priced.expert[2]))
    assert max(roles.values()) < zebra_seconds(priced, even)


def test_a_pipeline_is_one_that_stock_megatron_can_run():
    of = shape(layers=8)
    slow = profile(of, attention=(3e-3, 6e-3), expert=(3e-4, 6e-4))
    split = bench.systems.equal_stages(pipelines(group(2, 2, of, old=slow)), microbatches=8)
    system = bench.systems.pipelined(split, 2, 2)
    flags = system.flags("flash")
    assert len(set(split.ranks)) == 1 and sum(split.layers) == 8 and system.pools == ("fast", "fast", "slow", "slow")
    assert flags[:2] == ("--pipeline-model-parallel-size", str(len(split.layers)))
    assert flags[3] == "E" + "|".join(f"t*{count}" for count in split.layers) + "L"
    assert bench.systems.equal_stages(pipelines(group(3, 1, of, microbatches=2, old=slow)), microbatches=6).ranks == (1, 1, 1, 1)
    # Seven sequences are no whole number of a stage's microbatches, which have one for each of its ranks; with three and
    # two ranks stages of one are as many as ranks, and the model has fewer layers.
    assert bench.systems.equal_stages((one for one in pipelines(group(2, 2, of)) if one.ranks == (2, 2)), microbatches=7) is None
    assert bench.systems.equal_stages(pipelines(group(3, 2, shape(layers=4))), microbatches=12) is None


# ---- throttled traffic


def test_a_byte_takes_longer_by_the_difference_of_the_links():
    longer = bench.throttle.longer
    measured = {1e6: 30e-6, 1e8: 30e-6 + 99e6 / 50e9}
    assert longer(measured, 100) == pytest.approx(1 / 12.5e9 - 1 / 50e9)
    with pytest.raises(SystemExit, match="measured at 400 Gbit/s"):
        longer(measured, 500)


def test_waits_count_cycles_at_the_rate_that_was_seen():
    """On a GPU of 2 GHz, which a wait is told first that it has 1.7."""
    spun: list[int] = []

    class Event:
        def record(self):
            self.at = sum(spun) / 2e9

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    wait = bench.throttle.Wait(spun.append, Event)
    wait.seconds(1e-3)
    wait.seconds(1e-3)
    wait.settle()
    wait.seconds(1e-3)
    wait.seconds(1e-9)
    assert spun == [1_700_000, 1_700_000, 2_000_000]


def test_what_a_rank_keeps_is_no_traffic():
    import torch

    tensor = torch.empty(8, 4, dtype=torch.float16)
    assert bench.throttle._others(tensor, None, 4, 0) == 6 * 8
    assert bench.throttle._others(tensor, [1, 7], 2, 1) == 1 * 8
    assert bench.throttle._others(tensor[:0], [0, 0], 2, 1) == 0


def test_what_stages_hand_over_takes_longer_once_it_is_there():
    import torch
    import torch.distributed as dist

    happened: list = []
    work = SimpleNamespace(wait=lambda: happened.append("there"))
    handover = bench.throttle._handover(lambda operations: [work], SimpleNamespace(seconds=happened.append), 0.5)
    operations = [SimpleNamespace(op=op, tensor=torch.empty(rows)) for op, rows in ((dist.isend, 2), (dist.irecv, 3))]
    for one in handover(operations):
        assert happened == []
        one.wait()
    assert happened == ["there", 0.5 * 12]


# ---- the command


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Profiles that are there, of a small model, and ranks that write records at once; returns what each run was given."""
    runs: list = []
    monkeypatch.setitem(bench.compare.MODELS, "D1", (2, 512, 4))

    def take_profiles(folder, *_):
        folder.mkdir(exist_ok=True)
        of = bench.compare.model_shape("D1", 4096)
        link = {"gb_per_s": 100, "latency_us": 20}
        pools = {}
        for name, attention in (("fast", (1e-3, 2e-3)), ("slow", (3e-3, 6e-3))):
            (folder / f"{name}.json").write_text(profile(of, attention, (1e-5, 2e-5), kind=name).to_json())
            pools[name] = {"kind": f"{name}.json", "nodes": 1, "gpus_per_node": 2, "memory_gb": 40, "intra_node": link,
                           "inter_node": link}
        path = bench.prices.measured_in(folder)
        path.write_text(yaml.safe_dump({"pools": pools, "channel": {1e6: 3e-5, 1e8: 2e-3}}, sort_keys=False))
        return path

    def run(ranks, argv_of, limit, blocks):
        words = [list(map(str, argv_of(index))) for index in range(len(ranks))]
        runs.append(words)
        for index, of_rank in enumerate(records(9.5, *[0.9] * len(ranks))):
            Path(f"{words[index][1]}.{index}").write_text("".join(json.dumps(line) + "\n" for line in of_rank))
        return SimpleNamespace(failure=None)

    monkeypatch.setattr(bench.compare, "take_profiles", take_profiles)
    monkeypatch.setattr(bench.measure.lab, "run", run)
    monkeypatch.setattr(bench.measure.lab, "wrong_shares", lambda ranks, layers: [])
    return runs


def compare(monkeypatch, tmp_path, *words: str) -> list[dict]:
    monkeypatch.setattr(sys, "argv", ["compare.py", "--out", str(tmp_path / "cells.jsonl"), *words])
    assert bench.compare.main() == 0
    return bench.cells.read(tmp_path / "cells.jsonl")


def test_all_systems_are_measured_once(lab, tmp_path, monkeypatch, capsys):
    measured = compare(monkeypatch, tmp_path, "--busy")
    assert [one["system"] for one in measured] == list(bench.systems.NAMES)
    by_system = {one["system"]: one for one in measured}
    assert by_system["pipeline, best split"]["layout"] == "1+1 stages of 2, layers 1+1"
    assert set(by_system["zebra"]["busy"]) == {"profiled", "kernels", "nccl"}
    assert by_system["zebra"]["busy"]["kernels"].keys() == {"attention", "expert"}
    assert by_system["EP, all ranks"]["busy"]["kernels"].keys() == {"fast", "slow"}
    assert all(one["of_bound"] == one["bound"] / one["tasks"] for one in measured)
    for words in lab[0]:
        flags = words[words.index("--") + 1:]
        assert flags[flags.index("--train-iters") + 1] == str(int(words[words.index("--timed") + 1]) + 1)
    assert len(lab) == len(compare(monkeypatch, tmp_path, "--busy"))
    assert "left" not in capsys.readouterr().out


def test_what_is_left_when_time_is_over_is_for_the_next_call(lab, tmp_path, monkeypatch, capsys):
    systems = ("--systems", "EP, all ranks", "zebra")
    assert compare(monkeypatch, tmp_path, *systems, "--budget", "100", "--limit", "80") == []
    assert "profiles and all cells of D1" in capsys.readouterr().out
    assert len(compare(monkeypatch, tmp_path, *systems, "--budget", "200", "--limit", "80")) == 2
    assert len(compare(monkeypatch, tmp_path, *systems, "--budget", "70", "--limit", "80", "--batch", "4", "--lengths", "8192")) == 2
    assert "('D1', 8192, 'EP, all ranks', 0); ('D1', 8192, 'zebra', 0)" in capsys.readouterr().out


def test_a_file_is_of_one_machine(lab, tmp_path, monkeypatch, capsys):
    compare(monkeypatch, tmp_path, "--systems", "zebra")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--shares", "31", "25"])
    assert bench.compare.main() == 2
    assert "name another file" in capsys.readouterr().err and len(lab) == 1


def test_shares_that_compute_wrongly_are_refused_before_anything_is_measured(lab, tmp_path, monkeypatch, capsys):
    asked = []

    def wrong_shares(ranks, layers):
        asked.extend((rank.share, of.rows, of.hidden, of.dtype) for rank in ranks for of in layers)
        return ["with 31% (40 multiprocessors) products are wrong at 4096 rows"]

    monkeypatch.setattr(bench.measure.lab, "wrong_shares", wrong_shares)
    monkeypatch.setattr(sys, "argv", ["compare.py", "--out", str(tmp_path / "cells.jsonl"), "--shares", "31", "25",
                                      "--lengths", "4096", "8192"])
    assert bench.compare.main() == 2
    assert "give other --shares:\n  with 31% (40 multiprocessors)" in capsys.readouterr().err and not lab
    assert asked == [(share, rows, 512, "bfloat16") for share in (31, 25) for rows in (4096, 8192)]


def test_a_cell_is_likely_as_long_as_those_before():
    point = bench.compare.Point("D1", 4096, "zebra", 0)
    assert bench.compare.likely_seconds([], point, 120) == 120
    done = [cell(took=20.0), cell("zebra", took=40.0), {**cell(), "length": 8192, "took": 100.0}]
    assert bench.compare.likely_seconds(done, point, 120) == pytest.approx(44)


def test_throttled_cells_are_predicted_for_the_slower_network(lab, tmp_path, monkeypatch):
    only = ("--systems", "EP, all ranks", "zebra")
    free, slow = compare(monkeypatch, tmp_path, *only), compare(monkeypatch, tmp_path, *only, "--throttle-gbps", "100")[2:]
    for one, other in zip(free, slow, strict=True):
        assert one["predicted"] < other["predicted"] and one["bound"] == other["bound"]
    assert [run[0][run[0].index("--longer") + 1] == "0.0" for run in lab] == [True, True, False, False]
    cluster = read_cluster(tmp_path / "cells-D1-2-2" / "measured.yaml")
    throttled, more = bench.prices.throttled(cluster, 100, Notes())
    assert throttled.pools["fast"].channel(1e8) == pytest.approx(2e-3 + 1e8 * more)


def test_on_a_cluster_each_rank_has_its_host_and_gpu(tmp_path):
    """Hosts stand for nothing here: each command runs on this machine, and says what it was given."""
    machine = bench.hosts.Hosts({"fast": ["a", "a"], "slow": ["b"]}, "env HOST={host}", tmp_path)
    said = "import os, sys; print(*(os.environ[name] for name in ('HOST', 'RANK', 'CUDA_VISIBLE_DEVICES', 'MASTER_ADDR')), *sys.argv[1:])"
    ended = machine.run(("fast", "fast", "slow"), lambda rank: ["-c", said, f"t*{rank}|t", rank], limit=60)
    assert ended.failure is None
    assert [log.split() for log in ended.logs] == [["a", "0", "0", "a", "t*0|t", "0"], ["a", "1", "1", "a", "t*1|t", "1"],
                                                   ["b", "2", "0", "a", "t*2|t", "2"]]
    assert machine.run(("slow",), lambda rank: ["-c", "raise SystemExit(3)"], limit=60).codes == [3]


def test_hosts_are_as_many_as_ranks(capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.compare.parsed(["--out", "cells.jsonl", "--hosts", "a", "b"])
    assert "--hosts names 2 GPUs; --ranks are 4" in capsys.readouterr().err


# ---- figures


def test_figures_are_drawn_from_the_file_alone(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="figures need it")
    plots = modules("plots").plots
    measured = [cell(), cell("zebra", seconds=0.5, busy={"profiled": {"attention": 0.9, "expert": 0.8}, "kernels": {}}),
                {**cell("zebra", seconds=1.0), "length": 8192}, cell("zebra", gbps=100.0)]
    assert plots.throughput(measured, "D1")["", "2 fast, 2 slow"]["zebra"] == pytest.approx({4096: 65.536, 8192: 65.536})
    assert plots.busy(measured, "D1") == {("2 fast, 2 slow", "zebra"): {
        "attention, by profiles": {4096: 90.0}, "expert, by profiles": {4096: 80.0}}}
    for one in measured:
        bench.cells.append(tmp_path / "cells.jsonl", one)
    monkeypatch.setattr(sys, "argv", ["plots.py", str(tmp_path / "cells.jsonl"), "--out", str(tmp_path / "docs")])
    assert plots.main() == 0
    assert sorted(path.name for path in (tmp_path / "docs").iterdir()) == ["busy-D1.png", "throughput-D1.png"]
