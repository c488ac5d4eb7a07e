"""A message that does not come as it was sent is found, and said to be which; the others cost nothing but time."""

from __future__ import annotations

import re
import time
from types import SimpleNamespace

import pytest
import torch
from models import tiny
from ranks import assert_same_steps, run_function, run_ranks

from megatron_hetermoe.mcore.step_checks import Checker, StepChecks
from megatron_hetermoe.runtime.marks import Marks
from megatron_hetermoe.runtime.selfcheck import Passage, checksum
from megatron_hetermoe.schedule.numbering import Numbering
from megatron_hetermoe.schedule.tasks import Kind, Pass, Task

LAYOUT = ["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "2",
          "--hetermoe-stall-timeout", "5"]
CASES = [
    ("2:DF_2,3", "tokens from rank 0 to rank 2 on channel out, task DF_2,3 (layer 2, microbatch 3)"),
    ("1:CF_1,2", "tokens from rank 2 to rank 1 on channel back, task CF_1,2 (layer 1, microbatch 2)"),
    ("3:CB_2,1", "tokens from rank 0 to rank 3 on channel out, task CB_2,1 (layer 2, microbatch 1)"),
    ("0:DB_1,4", "tokens from rank 2 to rank 0 on channel back, task DB_1,4 (layer 1, microbatch 4)"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_checksum_sees_every_bit_and_the_order_of_rows(dtype):
    rows = torch.randn(7, 5, dtype=dtype)
    whole = checksum(rows).item()
    assert checksum(rows.clone()).item() == whole
    assert checksum(rows.flip(0).contiguous()).item() != whole
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    for bit in range(8 * rows.element_size() - 1):
        changed = rows.clone()
        changed.view(words)[3, 2] ^= 1 << bit
        assert checksum(changed).item() != whole
    assert checksum(rows[:, 0].contiguous()).item() != checksum(rows[:, 0].flip(0)).item()


def _exchanged(rank, world):
    """Ranks 0 and 1 each tell 2 something; it takes the one for the other."""
    import torch.distributed as dist

    from megatron_hetermoe.runtime.channels import Message
    from megatron_hetermoe.runtime.selfcheck import Checksums
    from megatron_hetermoe.schedule.tasks import Kind, Pass, Task

    task, sums = Task(Kind.DISPATCH, Pass.FORWARD, 1, 0), Checksums(range(world), rank)
    said = [torch.full((3, 2), float(number)) for number in range(2)]
    if rank < 2:
        sums.sending(task, [Message(2, 1, said[rank])])
    else:
        sums.received(task, [Message(0, 1, said[1]), Message(1, 1, said[0])])
    return [(wrong.sender, wrong.receiver) for wrong in sums.mismatches(dist.group.WORLD)]


def test_two_that_were_exchanged_are_noticed():
    assert run_function(_exchanged, 3) == [[(0, 2), (1, 2)]] * 3


def test_a_pipelines_message_has_the_models_layer():
    """Where a stage begins with the third layer, that is the first in its tasks."""
    task = Task(Kind.DISPATCH, Pass.FORWARD, 1, 0)
    checksums = SimpleNamespace(mismatches=lambda control: [Passage(task, 1, 2, 6)])
    session = SimpleNamespace(rank=6, control=None, numbering=Numbering((range(3, 5),)), plan=None)
    with pytest.raises(RuntimeError, match=r"from rank 2 to rank 6 on channel out, task DF_3,1 \(layer 3, microbatch 1\)"):
        Checker(session, Marks(), 1).after(StepChecks(None, checksums))


@pytest.mark.parametrize("fault, said", [CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:])])
def test_the_message_is_named(tmp_path, fault, said, summary):
    run = run_ranks([*LAYOUT, "--hetermoe-self-check", "2", *tiny(train_iters=4)], 4, cwd=tmp_path,
                    env={"HETERMOE_TEST_CORRUPT": fault})
    receiver = int(fault[0])
    seconds = time.time() - float((tmp_path / "fired").read_text())
    assert [code for rank, code in enumerate(run.exit_codes) if rank != receiver] == [3, 3, 3]
    for output in run.output:
        assert said in output and "what came is not what was sent" in output
    for rank in {0, 1, 2, 3} - {receiver}:
        assert len(re.findall(rf"^hetermoe: rank {receiver} \(.*self-check", run.output[rank], re.M)) == 1
        assert "Traceback" not in run.output[rank]
    assert all(len(steps) == 1 for steps in run.steps)
    role = "attention" if receiver < 2 else "expert"
    summary.append(("corrupt", role, fault.split(":")[1], seconds, f"sender, receiver {receiver}, channel and task named"))


@pytest.mark.slow
def test_it_finds_nothing_in_a_sound_run(tmp_path):
    flags = tiny(train_iters=4)
    plain = run_ranks([*LAYOUT, *flags], 4, cwd=tmp_path).check()
    checked = run_ranks([*LAYOUT, "--hetermoe-self-check", "1", *flags], 4, cwd=tmp_path).check()
    for rank in range(4):
        assert_same_steps(checked.steps[rank], plain.steps[rank])
