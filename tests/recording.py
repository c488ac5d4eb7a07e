"""Writes down what Megatron's training loop returns, inside a rank."""

from __future__ import annotations

import functools
import importlib.machinery
import inspect
import json
import os
import resource
import signal
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import megatron.training.training as training
from ranks import TERMINATE


def record_steps(path: Path) -> None:
    """Writes down what ``train_step`` and ``evaluate`` return and what goes to the logs, a line of JSON each.

    The log will not do: it rounds, and its first losses after a start are averages of two steps.
    """
    file = path.open("w", buffering=1, encoding="utf-8")

    steps: list[int] = []

    def floats(losses):
        return {name: float(value) for name, value in (losses or {}).items()}

    def wrapped(original: Callable, note: Callable):
        signature = inspect.signature(original)

        @functools.wraps(original)
        def recorded(*args, **kwargs):
            start = time.perf_counter()
            result = original(*args, **kwargs)
            seconds = time.perf_counter() - start
            given = signature.bind(*args, **kwargs).arguments
            file.write(json.dumps({**note(given, result), "seconds": seconds}) + "\n")
            return result

        return recorded

    def gradients(model):
        """What the optimizer has just used; with a distributed one the reduced part is a shard and the rest is not."""
        return {
            name.removeprefix("module."): float(parameter.main_grad.double().square().sum())
            for name, parameter in model.named_parameters()
        }

    def step(given, result):
        steps.append(len(steps))
        if os.environ.get(TERMINATE) == f"{os.environ['RANK']}:{len(steps)}":
            os.kill(os.getpid(), signal.SIGTERM)
        if len(steps) == 1:
            file.write(json.dumps({"kind": "gradients", "squares": gradients(given["model"][0])}) + "\n")
        losses, skipped, _, _, _, grad_norm, num_zeros, *_ = result
        return {
            "kind": "step",
            "loss": floats(losses),
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "skipped": int(skipped),
            "num_zeros": None if num_zeros is None else int(num_zeros),
            "loss_scale": float(given["optimizer"].get_loss_scale()),
            "resident": int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(),
        }

    def model(given, result):
        return {
            "kind": "model",
            "parameters": {name: parameter.numel() for name, parameter in result[0][0].named_parameters()},
        }

    def evaluation(given, result):
        return {"kind": "eval", "loss": floats(result[0])}

    def log(given, result):
        return {"kind": "log", "params_norm": given["params_norm"]}

    class Writer:
        """TensorBoard's, which is not installed here: writes scalars down beside the steps."""

        def __init__(self, log_dir, max_queue):
            pass

        def add_scalar(self, name, value, step):
            file.write(json.dumps({"kind": "scalar", "name": name, "step": int(step), "value": float(value)}) + "\n")

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    def to_wandb(values, step):
        for name, value in values.items():
            file.write(json.dumps({"kind": "scalar", "name": f"wandb/{name}", "step": int(step), "value": float(value)}) + "\n")

    # W&B's, which is not installed either.
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.config = types.SimpleNamespace(update=lambda values: None)
    wandb.init, wandb.log, wandb.finish = lambda **kwargs: None, to_wandb, lambda: None
    sys.modules["wandb"] = wandb
    sys.modules["torch.utils.tensorboard"] = types.SimpleNamespace(SummaryWriter=Writer)
    training.training_log = wrapped(training.training_log, log)
    training.setup_model_and_optimizer = wrapped(training.setup_model_and_optimizer, model)
    training.train_step = wrapped(training.train_step, step)
    training.evaluate = wrapped(training.evaluate, evaluation)
