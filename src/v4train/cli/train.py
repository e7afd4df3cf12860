"""``v4train train RECIPE``: train, or resume, a recipe."""

import argparse
import signal
import time

_STARTED = time.time()


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("recipe", nargs="?", help="the recipe file (YAML)")
    parser.add_argument("--config", metavar="RECIPE", help="the same, as an option")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="override a value; may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="check and resolve the recipe, count parameters and FLOPs, start nothing")


def run(args: argparse.Namespace) -> int:
    """Trains; 0 when finished or stopped by SIGTERM, 130 after Ctrl-C.

    Raises:
        ValueError: a mistake in the recipe, the data or the run directory.
    """
    from v4train import recipe as recipe_lib

    if bool(args.recipe) == bool(args.config):
        raise ValueError("name one recipe: v4train train RECIPE (or --config RECIPE)")
    loaded = recipe_lib.resolve(args.recipe or args.config, overrides=args.overrides)
    if args.dry_run:
        return _describe(loaded.config)
    from v4train.train import run as run_lib

    outcome = run_lib.run(loaded, program_started=_STARTED)
    return 130 if outcome.signal == signal.SIGINT else 0


def _describe(recipe) -> int:
    from v4train.config import dump
    from v4train.core import param
    from v4train.model import count, flops, transformer

    counted = count.parameters(param.declarations(transformer.Transformer(recipe.model)), top_k=recipe.model.moe.top_k)
    per_token = flops.training(recipe.model, length=recipe.data.sequence_length)
    print(dump.yaml_text(recipe))
    print(f"# parameters {counted.total:,} total, {counted.active:,} active per token")
    print(f"# training FLOPs per token {per_token.total:.4g} at {recipe.data.sequence_length:,} tokens a row (sparse count)")
    print(f"# mesh of {recipe.mesh.devices} device(s), {recipe.tokens_per_step:,} tokens per step")
    return 0
