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
    cluster = parser.add_argument_group("several processes", "like the recipe's section `cluster`; by default detected (docs/cluster.md)")
    cluster.add_argument("--coordinator", metavar="HOST:PORT", help="where the others reach process 0")
    cluster.add_argument("--processes", type=int, metavar="N", help="how many there are")
    cluster.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    stopped = "exit code when SIGTERM stopped the run before its last step (default: 0), for launchers that then start it again"
    parser.add_argument("--stopped-code", type=int, default=0, metavar="N", help=stopped)
    parser.add_argument("--dry-run", action="store_true", help="check and resolve the recipe, count parameters and FLOPs, start nothing")


def run(args: argparse.Namespace) -> int:
    """Trains; 0 when finished, 130 after Ctrl-C, ``--stopped-code`` when stopped by SIGTERM.

    Raises:
        ValueError: a mistake in the recipe, the data or the run directory.
    """
    from v4train import recipe as recipe_lib

    if bool(args.recipe) == bool(args.config):
        raise ValueError("name one recipe: v4train train RECIPE (or --config RECIPE)")
    said = {"coordinator": args.coordinator, "processes": args.processes, "process": args.process}
    options = [f"cluster.{key}={value}" for key, value in said.items() if value is not None]
    loaded = recipe_lib.resolve(args.recipe or args.config, overrides=[*args.overrides, *options])
    if args.dry_run:
        return _describe(loaded.config)
    from v4train.cli import main
    from v4train.train import run as run_lib

    traces = main.shows_traces(getattr(args, "debug", False))
    outcome = run_lib.run(loaded, program_started=_STARTED, describe=main.describe if not traces else lambda _: None)
    if outcome.signal == signal.SIGINT:
        return 130
    return args.stopped_code if outcome.summary.get("status") == "stopped" else 0


def _describe(recipe) -> int:
    from v4train.config import dump
    from v4train.core import param
    from v4train.model import count, flops, transformer
    from v4train.optim import flops as optim_flops

    declarations = param.declarations(transformer.Transformer(recipe.model))
    counted = count.parameters(declarations, top_k=recipe.model.moe.top_k)
    update = optim_flops.update(recipe.optimizer, declarations)
    per_token = flops.training(recipe.model, length=recipe.data.sequence_length)
    print(dump.yaml_text(recipe))
    print(f"# parameters {counted.total:,} total, {counted.active:,} active per token")
    print(f"# training FLOPs per token {per_token.total:.4g} at {recipe.data.sequence_length:,} tokens a row (sparse count)")
    share = update.total / (update.total + per_token.total * recipe.tokens_per_step)
    print(f"# optimizer FLOPs per step {update.total:.4g} (Newton-Schulz {update.newton_schulz:.4g}), {share:.1%} of a step's")
    print(f"# mesh of {recipe.mesh.devices} device(s), {recipe.tokens_per_step:,} tokens per step")
    return 0
