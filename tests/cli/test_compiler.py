"""Megatron's small functions are compiled, but not on Volta, and not where a flag or the environment says so."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_hetermoe.mcore.platform import compiler


@pytest.mark.parametrize("argv, capability, set_to, found", [
    ([], (7, 0), None, "1"), ([], (7, 5), None, None), ([], (9, 0), None, None), (["--disable-jit-fuser"], (9, 0), None, "1"),
    ([], (7, 0), "0", "0"), (["--disable-jit-fuser"], (9, 0), "0", "0"),
])
def test_when_the_compiler_is_off(monkeypatch, argv, capability, set_to, found):
    monkeypatch.delenv(compiler.SWITCH, raising=False)
    if set_to is not None:
        monkeypatch.setenv(compiler.SWITCH, set_to)
    said = compiler.choose(argv, capability)
    assert os.environ.get(compiler.SWITCH) == found
    assert ("compute capability 7.0" in said) is (not argv and found == "1")
    monkeypatch.delenv(compiler.SWITCH, raising=False)


def test_megatrons_functions_are_then_plain():
    """As its import finds torch, and with the GPU's own code: no stand-ins for the CPU."""
    look = ("from megatron_hetermoe.mcore.platform import compiler; compiler.choose([], (7, 0))\n"
            "from megatron.core.fusions import fused_bias_swiglu, fused_bias_dropout\n"
            "for function in (fused_bias_swiglu.swiglu, fused_bias_dropout.bias_dropout_add_fused_train):\n"
            "    assert not hasattr(function, '_torchdynamo_orig_callable'), function\n")
    environment = {name: value for name, value in os.environ.items() if name != compiler.SWITCH}
    subprocess.run([sys.executable, "-W", "ignore", "-c", look], check=True, timeout=120, env=environment)
