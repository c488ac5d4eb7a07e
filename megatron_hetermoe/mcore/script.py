"""A training script that is not this package's, as Megatron-LM's ``pretrain_gpt.py``, trains disaggregated.

Such a script asks Megatron for its arguments, and then calls ``pretrain``. Both names are patched before it runs; its
data sets, forward step, loss, model configuration and arguments of its own stay the script's.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from megatron.core.parallel_state import default_embedding_ranks, default_position_embedding_ranks
from megatron.training.models.gpt import GPTModelConfig

from megatron_hetermoe.config.errors import Problems, UsageError, tell
from megatron_hetermoe.config.flags import Flags
from megatron_hetermoe.mcore import patches
from megatron_hetermoe.mcore.arguments import Asked, disaggregated_arguments
from megatron_hetermoe.mcore.pretrain import Script, begin, run_script

# Arguments of pretrain() that say in which pipeline stages embeddings are, and what they must say: groups are made by it.
_EMBEDDINGS = {
    "get_embedding_ranks": default_embedding_ranks, "get_position_embedding_ranks": default_position_embedding_ranks,
}

# Those that cannot be honoured, and why.
_REFUSED = {
    "process_non_loss_data_func": "it is called on the last rank alone, which has no part of the model but experts",
    "non_loss_data_func": "it runs the model outside the schedule",
    "store": "ranks meet in a store of the run's",
    "inprocess_call_wrapper": "a rank that has failed ends the run",
    "p2p_communicator": "pipeline stages hand over on a channel of their own",
    "pg_collection": "process groups follow from the layout",
    "skip_model_parallel_init": "process groups follow from the layout",
}


class ScriptRun:
    """Stands behind the two names that a script calls. There is one in a process.

    Args:
        flags: the ``--hetermoe`` ones.
        problems: what is wrong with them.
    """

    def __init__(self, flags: Flags, problems: Problems):
        self._flags = flags
        self._problems = problems
        self._plan = None
        self._args = None
        self._met = None
        self.trained = False

    def install(self) -> None:
        """Patches the two names.

        Raises:
            UsageError: if Megatron's source is not as the patches expect.
        """
        patches.apply(patches.SCRIPT, {
            "megatron.training.arguments.parse_and_validate_args": self._arguments,
            "megatron.training.training.pretrain": self._pretrain,
        })

    def _arguments(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def parse_and_validate_args(
            extra_args_provider: Any = None, ignore_unknown_args: bool = False, args_defaults: Any = None
        ) -> Any:
            asked = Asked(extra_args_provider, args_defaults or {})
            try:
                if ignore_unknown_args:
                    raise UsageError([f"{sys.argv[0]} has Megatron ignore flags that it does not know, so a misspelt one "
                                      "would go unseen; it cannot run with --hetermoe"])
                self._args, self._plan = disaggregated_arguments(self._flags, sys.argv[1:], self._problems, asked)
                self._met = begin(self._args, self._plan, self._flags)
            except UsageError as error:
                sys.exit(tell(error))
            return self._args

        return parse_and_validate_args

    def _pretrain(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def pretrain(*args: Any, **kwargs: Any) -> None:
            given = {name: value for name, value in signature.bind(*args, **kwargs).arguments.items()
                     if value is not None and value is not False}
            self.trained = True
            try:
                self._check(given)
                run_script(self._args, self._plan, self._flags, Script(
                    given["cfg_container"], given["train_valid_test_dataset_provider"], given["forward_step_func"],
                    given["model_type"],
                ), self._met)
            except UsageError as error:
                sys.exit(tell(error))

        return pretrain

    def _check(self, given: dict[str, Any]) -> None:
        """What a script asks of ``pretrain`` and a disaggregated run does not do."""
        problems = Problems()
        if self._plan is None:
            problems.add("pretrain() was called with arguments that are not from megatron.training.arguments."
                         "parse_and_validate_args(); take them from there")
        model = given["cfg_container"].model
        if "model_provider" in given or model is None:
            problems.add("pretrain() is given a function that builds the model, which cannot be split; give it a "
                         "configuration with a model, as megatron.training.argument_utils.gpt_config_from_args() makes")
        elif type(model) is not GPTModelConfig:
            problems.add(f"the model is a {type(model).__name__}; only Megatron's GPTModelConfig can be split")
        else:
            for name in ("transformer_layer_spec", "pre_wrap_hooks", "post_wrap_hooks"):
                if getattr(model, name, None):
                    problems.add(f"the model's {name} cannot be used: layers are Megatron's own; leave it out")
        stages = list(range(self._plan.stages if self._plan else 1))
        for name, default in _EMBEDDINGS.items():
            if name in given and set(given[name](stages)) != set(default(stages)):
                problems.add(f"pretrain() is given a {name} that names other pipeline stages than Megatron's own: leave it out")
        for name, reason in _REFUSED.items():
            if name in given:
                problems.add(f"pretrain() is given {name}, which is not supported: {reason}")
        try:
            problems.raise_if_any()
        except UsageError as error:
            raise UsageError([f"{sys.argv[0]}: {problem}" for problem in error.problems]) from None
