"""Each of Megatron's flags that is not supported is refused by its name; older names of flags count; layouts supersede some."""

from __future__ import annotations

import pytest
from models import tiny
from ranks import run_function

LAYOUT = ["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "2"]


def _refused_by_name(rank: int, world: int) -> dict[str, str]:
    """What is said against each flag of the table that is refused by itself, given alone with a value that it takes."""
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    from megatron_hetermoe.config.errors import Problems, UsageError
    from megatron_hetermoe.mcore.unsupported import UNSUPPORTED, check_supported

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))

    def words(flag: str, *named: str) -> list[str]:
        """The flag with a value: what the table names, or the last choice, or one that suits its type."""
        action = parser._option_string_actions[flag]
        if action.choices:
            choices = [str(choice) for choice in reversed(action.choices)]
            value = next(word for word in [*named, *choices] if word in choices and not ("other" in named and word in named))
        else:
            value = "2" if action.type in (int, float, None) else "x"
        return [flag, *[value] * (action.nargs if isinstance(action.nargs, int) else 1)]

    said = {}
    for flag, *named in (name.split() for name, _, _ in UNSUPPORTED if name.startswith("--")):
        further = ["--mtp-num-layers", "1"] if flag.startswith("--mtp") else []
        problems = Problems()
        check_supported(parser.parse_args([*tiny(), *words(flag, *named), *further]), problems)
        try:
            problems.raise_if_any()
        except UsageError as error:
            said[flag] = str(error)
        else:
            said.setdefault(flag, "")
    return said


# Refused beside other flags only: their own tests are in test_bad_input.py and tests/parity.
BESIDE = {"--mtp-num-layers", "--apply-layernorm-1p", "--decrease-batch-size-if-needed", "--step-batch-size-schedule",
          "--recompute-modules"}


def test_each_flag_of_the_table_is_refused_by_its_name():
    (said,) = run_function(_refused_by_name, 1)
    assert len(said) > 40
    for flag, message in said.items():
        assert flag in BESIDE or flag in message and "is not supported with --hetermoe: " in message, (flag, message)


def _checked(rank: int, world: int, cases: list[list[str]]) -> list[str]:
    """For each command line what is printed, or said against it."""
    import contextlib
    import io
    import os

    from megatron_hetermoe.config.errors import Problems, UsageError
    from megatron_hetermoe.config.flags import parse_flags
    from megatron_hetermoe.mcore.arguments import disaggregated_arguments

    os.environ["WORLD_SIZE"] = "4"
    said = []
    for argv in cases:
        problems, printed = Problems(), io.StringIO()
        flags, rest = parse_flags(argv, problems)
        try:
            with contextlib.redirect_stdout(printed):
                disaggregated_arguments(flags, rest, problems)
            said.append(printed.getvalue())
        except UsageError as error:
            said.append(str(error))
    return said


@pytest.fixture(scope="module")
def checked():
    """What is said of each case, all looked at by one process."""
    cases = {
        "dispatcher": tiny(moe_token_dispatcher_type="flex", moe_enable_deepep=True, moe_deepep_num_sms=20),
        "gathered": tiny(context_parallel_size=2, cp_comm_type="a2a"),
        "window": ["--hetermoe-attention", "efficient", *tiny(window_size="8,0")],
        "megatron's window": ["--hetermoe-attention", "megatron", *tiny(window_size="8,0")],
        "softmax": tiny(context_parallel_size=2, softmax_type="off-by-one"),
        "old name": tiny(recompute_activations=True, recompute_modules=["mlp", "gdn_norm_out"]),
        "norm": tiny(apply_layernorm_1p=True),
        "gradients": tiny(main_grads_dtype="bf16"),
    }
    (said,) = run_function(_checked, 1, [[*LAYOUT, *argv] for argv in cases.values()])
    return dict(zip(cases, said, strict=True))


def test_a_dispatcher_of_the_recipe_is_superseded_with_all_that_goes_with_it(checked):
    for flag in ("--moe-token-dispatcher-type", "--moe-enable-deepep", "--moe-deepep-num-sms"):
        assert f"hetermoe: {flag} is superseded: the asymmetric dispatcher carries tokens\n" in checked["dispatcher"]


def test_gathered_keys_supersede_how_stock_megatron_passes_them_on(checked):
    assert "hetermoe: --cp-comm-type is superseded: " in checked["gathered"]


def test_what_torchs_attention_kernels_do_not_know_is_refused(checked):
    assert "--window-size is not supported with torch's attention kernels" in checked["window"]
    assert "is not supported" not in checked["megatron's window"]
    assert "--softmax-type off-by-one is not supported with torch's attention kernels" in checked["softmax"]


def test_flags_count_by_their_older_names(checked):
    assert "--recompute-modules of what is not there is not supported" in checked["old name"]


def test_norms_that_torch_lacks(checked):
    assert "--apply-layernorm-1p with --transformer-impl local is not supported" in checked["norm"]


def test_what_megatrons_configurations_check_is_found_before_ranks_meet(checked):
    assert "Megatron does not accept these flags: main_grads_dtype can only be fp32" in checked["gradients"]
