"""``hetermoe convert``: Hugging Face models to Megatron's checkpoints, and back."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_hetermoe.cli.activity import progress_bar
from megatron_hetermoe.cli.environment import environment
from megatron_hetermoe.cli.interrupt import interruptible
from megatron_hetermoe.cli.quiet import quiet
from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.config.flags import parse_flags
from megatron_hetermoe.config.recipe import Recipe, load_recipe, locating, override, places_left, value_of

INSTALL = "pip install 'megatron-hetermoe[convert]'"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "convert", help="turn a Hugging Face model into a Megatron checkpoint, or back",
        usage="hetermoe convert import HF_DIR --recipe RECIPE.yaml --out CKPT_DIR [-- Megatron's flags]\n"
              "       hetermoe convert export CKPT_DIR --recipe RECIPE.yaml --out HF_DIR [--reference HF_DIR] [-- flags]",
        description="import writes a checkpoint that any layout, and stock Megatron, loads with --load; export writes a "
                    "folder that transformers loads. The recipe says what model it is, and is checked against the "
                    "model's config.json. Both run on the CPU.")
    parser.add_argument("direction", choices=("import", "export"))
    parser.add_argument("source", metavar="DIR", help="the Hugging Face folder, or the checkpoint's (--save)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; it must not be there yet")
    parser.add_argument("--recipe", metavar="RECIPE.yaml", help="of the model (default: what stands after --)")
    parser.add_argument("--reference", metavar="HF_DIR", help="export: whose config.json and tokenizer files to take")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="export: of the weights (default: as saved)")
    parser.add_argument("--iteration", type=int, metavar="N", help="export: which checkpoint (default: the last)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    problems = Problems()
    out, source = Path(args.out), Path(args.source)
    if out.exists():
        problems.add(f"{out} is there already: give another name to --out, or remove it")
    if not source.is_dir():
        problems.add(f"{source} is no folder; a model is downloaded before it is converted")
    if not args.recipe and not args.overrides:
        problems.add("which model is it? Give its --recipe, or Megatron's flags after --")
    if args.direction == "import" and (args.reference or args.dtype or args.iteration is not None):
        problems.add("--reference, --dtype and --iteration are for export: leave them out")
    if not importlib.util.find_spec("safetensors"):
        problems.add(f"safetensors is not installed: {INSTALL}")
    with problems.taking():
        recipe = load_recipe(args.recipe, os.environ) if args.recipe else Recipe()
        words = override(recipe.argv, args.overrides)
    problems.raise_if_any()
    _, argv = parse_flags(words, problems)
    alone = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "HETERMOE_PLATFORM": "cpu"}
    with environment({**recipe.env, **alone}), locating(places_left(recipe, args.overrides)), interruptible():
        print("importing Megatron ...", flush=True)
        _convert(args, source, out, argv, problems)
    return 0


def _convert(args: argparse.Namespace, source: Path, out: Path, argv: Sequence[str], problems: Problems) -> None:
    """Converts and says what was done. The world is this process."""
    impl = value_of(argv, "--transformer-impl") or "transformer_engine"  # Megatron's default
    with quiet():
        from megatron_hetermoe.mcore.platform import cpu
        from megatron_hetermoe.mcore.platform.flags import for_cpu

        cpu.install()
        argv, _ = for_cpu(argv)
        from megatron_hetermoe.mcore.convert.checkpoint import open_saved
        from megatron_hetermoe.mcore.convert.convert import export_model, import_model
    with progress_bar() as progress, quiet():
        if args.direction == "import":
            done = import_model(source, argv, impl, out, problems, progress)
        else:
            saved = None
            with problems.taking():
                saved = open_saved(source, args.iteration)
            done = export_model(saved, argv, impl, Path(args.reference) if args.reference else None, args.dtype, out, problems,
                                progress)
    print(f"wrote {out}: a {done.family} model, {done.tensors:,} tensors, {done.bytes / 1e9:,.3f} GB")
    if args.direction == "export":
        return
    flags = f"--load {out} --padded-vocab-size {done.rows}"
    if impl == "transformer_engine":  # whose modules ask for states that no one has saved
        flags += " --dist-ckpt-strictness log_unexpected"
    print(f"train from it with {flags}")
