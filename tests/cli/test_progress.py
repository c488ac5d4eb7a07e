"""Megatron's log lines become what is shown."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from megatron_hetermoe.cli.progress import Display, Step, Watch, describe, parse_step
from megatron_hetermoe.cli.summary import failure, print_summary
from megatron_hetermoe.config.log_lines import PLAN

LINE = (" [2026-01-01 00:00:00.000000] iteration {:8d}/{:8d} | consumed samples: {:12d} | elapsed time per iteration "
        "(ms): {:.1f} | learning rate: 3.000000E-04 | global batch size:    16 | lm loss: {:.6E} | "
        "load_balancing_loss: 1.0E+00 | loss scale: 1.0 | grad norm: 0.731 | number of skipped iterations:   0 |\n")
SAVED = ("  [2026-01-01 00:00:00.000000] successfully saved checkpoint from iteration     200 to runs/my run/ckpt "
         "[ t 1/1, gtp_remat 1/1, p 1/1 ]\n")
PLANNED = {"ranks": [{"rank": 0, "role": "attention", "group": 0, "experts": 0},
                     {"rank": 1, "role": "attention", "group": 0, "experts": 3},
                     {"rank": 2, "role": "expert", "group": 0, "experts": 13}], "schedule": "zebra", "wave": 4}


def line(iteration, loss=5.5, total=200, milliseconds=500.0):
    return LINE.format(iteration, total, iteration * 16, milliseconds, loss)


def test_parse_step():
    assert parse_step(line(10)) == Step(10, 200, 500.0, 16, 5.5, 0.731)
    assert parse_step(line(10).replace(" lm loss: 5.500000E+00 |", "")).loss is None
    for other in ("", "iteration", "saving checkpoint at iteration 10", "iteration 3/ 5 | nothing: here |"):
        assert parse_step(other) is None


def test_watch_takes_complete_lines_of_any_rank(tmp_path):
    first, last = tmp_path / "rank0.log", tmp_path / "rank1.log"
    watch = Watch([first, last])
    watch.read()
    assert watch.last is None and describe(watch) == "starting"
    first.write_text(f"  seq_length ...................................... 128\n{PLAN}{json.dumps(PLANNED)}\n")
    with last.open("w") as file:
        text = line(1)
        for piece in (text[:50], text[50:], line(5, 4.0)[:-1]):
            file.write(piece)
            file.flush()
            watch.read()
        assert (watch.first.iteration, watch.last.iteration) == (1, 1)
        file.write("\n")
        file.flush()
        watch.read()
    assert watch.last.iteration == 5 and watch.plan == PLANNED
    assert watch.tokens_per_second() == 16 * 128 / 0.5 and watch.seconds_left() == 97.5
    assert describe(watch) == "step 5/200  loss 4.000  4,096 tokens/s  1:38 left"
    first.open("a").write(SAVED)
    watch.read()
    assert watch.checkpoint == (200, "runs/my run/ckpt")


@pytest.mark.parametrize("terminal", [False, True])
def test_display_ends_with_the_last_step(tmp_path, terminal):
    log = tmp_path / "rank0.log"
    out = io.StringIO()
    watch = Watch([log])
    with Display(Console(file=out, force_terminal=terminal, width=120), interval=60) as display:
        for iteration in (1, 2, 3):
            log.write_text("".join(line(number, total=3) for number in range(1, iteration + 1)))
            watch.read()
            display.update(watch)
    assert "step 3/3  loss 5.500  done" in out.getvalue()
    if not terminal:
        assert [text.split()[1] for text in out.getvalue().splitlines()] == ["1/3", "3/3"]


def summary(tmp_path, text):
    log = tmp_path / "rank0.log"
    log.write_text(text)
    watch = Watch([log])
    watch.read()
    out = io.StringIO()
    print_summary(Console(file=out, width=80), watch, ["hetermoe", "train", "my recipe.yaml"],
                  ["--train-iters", "200"], Path("logs"))
    return out.getvalue()


def test_summary(tmp_path):
    text = summary(tmp_path, f"{PLAN}{json.dumps(PLANNED)}\n{line(1)}{line(200, 2.5)}{SAVED}")
    for part in ("all but experts; 3 experts, over all layers", "13 experts, over all layers",
                 "zebra, 4 microbatches on the way", "5.500 at step 1, 2.500 at step 200", "runs/my run/ckpt",
                 "hetermoe train 'my recipe.yaml' -- --load 'runs/my run/ckpt' --train-iters 400",
                 "hetermoe train 'my recipe.yaml' -- --train-iters 200 --hetermoe-schedule sequential"):
        assert part in text
    assert "none; `-- --save DIR` saves one" in summary(tmp_path, "nothing\n")


def test_failure():
    ours = "noise\nhetermoe: 2 problems:\n  - a\n  - b\n"
    assert failure(ours, 2) == "hetermoe: 2 problems:\n  - a\n  - b"
    assert failure("usage: x\n  [--y]\npretrain.py: error: unrecognized arguments: --z\n", 2) == \
        "pretrain.py: error: unrecognized arguments: --z"
    assert failure("".join(f"{number}\n" for number in range(50)), 1).splitlines() == [str(n) for n in range(30, 50)]
    assert failure("", 1) == ""


def test_failure_of_a_peer():
    said = "hetermoe: rank 2 (expert, host a, pid 1) has died\nhetermoe: rank 0 (attention, host a, pid 2) awaited x"
    assert failure(f"noise\n{said}\nmore noise", 3) == said
