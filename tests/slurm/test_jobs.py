"""Batch scripts of ``hetermoe submit`` on a real Slurm."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megatron_hetermoe.cli.main import main

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "scripts" / "recipes" / "quickstart.yaml"
STEPS = 7
CUT = ["--num-layers", "2", "--global-batch-size", "8", "--train-iters", str(STEPS), "--lr-decay-iters", "10",
       "--log-interval", "1"]
_STEP = re.compile(r"iteration +(\d+)/.*?lm loss: (\S+).*?grad norm: (\S+)")
_PLACES = re.compile(r"hetermoe: ranks are in (.*)")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The quick start's data, less of it."""
    prefix = tmp_path_factory.mktemp("data") / "text"
    assert main(["data", "--out", str(prefix), "--glob", "*.py", str(ROOT / "tests")]) == 0
    return prefix


def cluster_file(folder: Path, common: dict, new: dict, old: dict) -> Path:
    """A cluster of one node of each kind."""
    links = {"intra_node": {"gb_per_s": 20, "latency_us": 10}, "inter_node": {"gb_per_s": 10, "latency_us": 20}}
    pools = {
        name: {"kind": kind, "nodes": 1, "gpus_per_node": 2, "memory_gb": 16, "slurm": slurm, **links}
        for name, kind, slurm in (("new", "A40", new), ("old", "V100-SXM2", old))
    }
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump({"slurm": {"time": "00:30:00", **common}, "pools": pools}))
    return path


def submit(slurm, monkeypatch, capsys, *words: object) -> str:
    """The number of the job that ``hetermoe submit --yes`` submits."""
    monkeypatch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
    assert main(["submit", str(RECIPE), "--yes", *map(str, words)]) == 0
    return re.fullmatch(r"job (\d+)", capsys.readouterr().out.strip())[1]


def steps(text: str) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step. A step that ran again counts as it was the last time."""
    return {int(step): (float(loss), float(norm)) for step, loss, norm in _STEP.findall(text)}


@pytest.fixture(scope="module")
def unbroken():
    """Loss and gradient norm by step of the heterogeneous job, which is not cut off."""
    return {}


def test_a_heterogeneous_job_lands_where_the_layout_says(slurm, data, tmp_path, monkeypatch, capsys, unbroken):
    """A component for each pool, with two ranks each."""
    monkeypatch.chdir(tmp_path)
    cluster = cluster_file(tmp_path, {}, {"partition": "a40"}, {"partition": "v100"})
    job = submit(slurm, monkeypatch, capsys, "--cluster", cluster, "--", "--data-path", data, *CUT, "--save",
                 tmp_path / "it's saved")
    text = slurm.wait(job, tmp_path / f"quickstart-{job}.log", lambda state, _: state in ("COMPLETED", ""))
    unbroken |= steps(text)
    assert sorted(unbroken) == list(range(1, STEPS + 1)), text[-3000:]
    assert _PLACES.search(text)[1] == (
        "the launcher's order: 0-1 on no GPU of a40-0 (attention), 2-3 on no GPU of v100-0 (expert)")
    assert (tmp_path / "it's saved" / "latest_checkpointed_iteration.txt").read_text() == str(STEPS)


def test_a_job_that_is_cut_off_goes_on(slurm, data, tmp_path, monkeypatch, capsys, unbroken):
    """One component over a node of each kind, and attention on the one that Slurm numbers last. Its time runs out, then it
    is killed after a save; both times it is queued again, and its steps are those of the job that nobody cut off."""
    monkeypatch.chdir(tmp_path)
    cluster = cluster_file(tmp_path, {"partition": "mixed"}, {"constraint": "v100"}, {"constraint": "a40"})
    saved = tmp_path / "saved"
    job = submit(slurm, monkeypatch, capsys, "--cluster", cluster, "--mixed", "--", "--data-path", data, *CUT,
                 "--save", saved, "--save-interval", "5", "--hetermoe-attention-ranks", "1",
                 "--hetermoe-expert-ranks", "1")
    log = tmp_path / f"quickstart-{job}.log"
    slurm.wait(job, log, lambda _, text: 2 in steps(text))
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the limit
    text = slurm.wait(job, log, lambda state, _: state == "PENDING")
    cut_at = int((saved / "latest_checkpointed_iteration.txt").read_text())
    assert 2 <= cut_at < 5 and max(steps(text)) == cut_at and "the job is queued again" in text

    slurm.start_again(job)
    slurm.wait(job, log, lambda _, text: text.count("successfully saved checkpoint from iteration       5") == 1)
    slurm.run("scontrol", "requeue", job)
    slurm.wait(job, log, lambda state, _: state == "PENDING")
    slurm.start_again(job)
    text = slurm.wait(job, log, lambda state, _: state in ("COMPLETED", ""))

    assert text.count("loading distributed checkpoint from") == 2
    assert f"at iteration {cut_at}" in text and "at iteration 5" in text
    assert set(_PLACES.findall(text)) == {
        "pool order, which is not the launcher's: 0 on no GPU of v100-0, 1 on no GPU of a40-0"}
    found = steps(text)
    assert sorted(found) == list(range(1, STEPS + 1))
    for step, (loss, norm) in found.items():
        assert norm == pytest.approx(unbroken[step][1], abs=1.01e-3), f"step {step}"
    for step in (cut_at + 1, 6):  # later lines have the mean of two steps where the job began anew
        assert found[step][0] == pytest.approx(unbroken[step][0], rel=1e-5), f"step {step}"


def test_a_job_that_loses_a_node_goes_on_with_what_is_left(slurm, data, tmp_path, monkeypatch, capsys, unbroken):
    """One attention and two expert ranks, on a node each; one of the latter fails after a save, and the job starts again
    without it, under the plan that fits."""
    monkeypatch.chdir(tmp_path)
    cluster = cluster_file(tmp_path, {}, {"partition": "a40"}, {"partition": "old"})
    document = yaml.safe_load(cluster.read_text())
    for pool in document["pools"].values():
        pool["gpus_per_node"] = 1
    document["pools"]["old"]["nodes"] = 2
    cluster.write_text(yaml.safe_dump(document))
    saved = tmp_path / "saved"
    job = submit(slurm, monkeypatch, capsys, "--cluster", cluster, "--elastic", "--", "--data-path", data, *CUT,
                 "--save", saved, "--save-interval", "3", "--hetermoe-attention-ranks", "1",
                 "--hetermoe-expert-ranks", "2")
    log = tmp_path / f"quickstart-{job}.log"
    slurm.wait(job, log, lambda _, text: "successfully saved checkpoint from iteration       3" in text)
    with slurm.without("v100-1"):
        slurm.wait(job, log, lambda state, _: state == "PENDING", 60)
        slurm.start_again(job)
        text = slurm.wait(job, log, lambda state, _: state in ("COMPLETED", ""))
    assert re.findall(r"the nodes have (\d) attention and (\d) expert ranks", text) == [("1", "2"), ("1", "1")]
    assert "1 expert ranks in place of 2" in text and "at iteration 3" in text
    found = steps(text)
    assert sorted(found) == list(range(1, STEPS + 1))
    for step, (loss, norm) in found.items():
        assert norm == pytest.approx(unbroken[step][1], abs=2e-3), f"step {step}"
        if step != 5:  # the mean of two steps where the job began anew
            assert loss == pytest.approx(unbroken[step][0], rel=1e-5), f"step {step}"
