"""Processes become ranks in pool order, whichever way their launcher numbers them."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

from models import tiny
from ranks import run_ranks
from recipes import recipe_of

HETERMOE = ["--hetermoe", "--hetermoe-attention-ranks", "1", "--hetermoe-expert-ranks", "1"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_what_does_not_fit_is_refused_by_all_ranks(tmp_path):
    """The store is in a rank, which must not leave before the others have read what it holds."""
    run = run_ranks([*tiny(), *HETERMOE], 2, cwd=tmp_path, own_store=True,
                    env={"HETERMOE_POOLS": "attention=A40 expert=V100"})
    assert run.exit_codes == [2, 2]
    said = "".join(run.output)
    assert "hetermoe: 2 problems:" in said and "process 0" in said and "process 1" in said and "Traceback" not in said
    run = run_ranks([*tiny(), *HETERMOE], 2, cwd=tmp_path, own_store=True, env={"HETERMOE_POOL": "expert"})
    assert run.exit_codes == [2, 2]
    assert "the layout has 1 of attention and 1 of expert, the launcher started 2 of expert" in "".join(run.output)


def test_torchrun_over_nodes_that_come_the_wrong_way_round(tmp_path):
    """The first node has the expert rank. It trains all the same, each role in its precision, with the losses of one that came
    the right way."""
    recipe = tmp_path / "recipe.yaml"
    model = tiny(train_iters=3, bf16=True, loss_scale=1024)
    recipe.write_text(recipe_of(model, {"attention-ranks": 1, "expert-ranks": 1, "expert-precision": "fp16"}))
    port = free_port()
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node),
             "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port),
             "-m", "megatron_hetermoe", "rank", str(recipe)],
            env={**os.environ, "HETERMOE_POOL": pool}, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) for node, pool in enumerate(("expert", "attention"))
    ]
    expert, attention = (node.communicate(timeout=300)[0] for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], expert + attention
    place = re.escape(f"no GPU of {socket.gethostname()}")
    assert re.search(rf"not the launcher's: 0 on {place} \(attention\), 1 on {place} \(expert\)", attention)
    right = run_ranks([*model, *HETERMOE, "--hetermoe-expert-precision", "fp16"], 2, cwd=tmp_path).check()
    losses = re.findall(r"lm loss: (\S+)", expert)  # the last rank prints them, and it is the expert rank
    expected = [f"{step.loss['lm loss']:.6E}" for step in right.steps[0]]
    # Megatron's second line has the mean of the first two steps.
    assert len(losses) == 3 and losses[::2] == expected[::2]
