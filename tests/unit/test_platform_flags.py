"""What the CPU cannot do of a recipe is named, and the rest is left as it was."""

from __future__ import annotations

from megatron_hetermoe.mcore.platform.flags import for_cpu

OFF = [
    "--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion", "--no-rope-fusion", "--no-persist-layer-norm",
    "--transformer-impl", "local",
]


def test_flags_that_need_a_gpu_are_dropped_with_their_values_and_named():
    argv, said = for_cpu(
        ["--bf16", "--transformer-impl", "transformer_engine", "--cross-entropy-fusion-impl", "te",
         "--moe-grouped-gemm", "--lr", "1e-3"]
    )
    assert argv == ["--bf16", "--lr", "1e-3", *OFF]
    assert [line.split(":")[1].split()[0] for line in said] == [
        "--moe-grouped-gemm", "--cross-entropy-fusion-impl", "--transformer-impl",
    ]


def test_the_default_of_the_transformers_implementation_is_changed_without_a_word():
    assert for_cpu(["--bf16"]) == (["--bf16", *OFF], [])


def test_what_a_cpu_can_do_stays():
    given = ["--transformer-impl=local", "--no-rope-fusion", "--data-path", "1", "a", "2", "b"]
    argv, said = for_cpu(given)
    assert argv[: len(given)] == given and not said
    assert argv[len(given):] == [flag for flag in OFF[:4] if flag != "--no-rope-fusion"]
