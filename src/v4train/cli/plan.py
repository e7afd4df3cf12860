"""``v4train plan RECIPE --chips H200x512``: what a run would take, before anything is started.

From the recipe alone: parameters, bytes on a device by cause, FLOPs, what devices send each other, the time of a step, days and dollars;
and if it does not fit, the smallest change after which it does. With ``--compile`` the compiler's account of the step stands beside it.
"""

import argparse
import json
from typing import Any


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    from v4train.cli import plan_compile

    parser.add_argument("recipe", help="the recipe file (YAML)")
    parser.add_argument(
        "--chips", metavar="CHIPxN", help="the machine: H200x512, v5px512, v5p:8x8x8, v5p:8x8x8:2 (two slices); by default that of --target"
    )
    parser.add_argument("--search", action="store_true", help="rank the meshes that the machine could have, instead of using the recipe's")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="meshes to show (default: 10)")
    parser.add_argument("--price", type=float, default=2.0, metavar="DOLLARS", help="for a chip hour (default: 2)")
    parser.add_argument("--tokens", type=float, metavar="N", help="to train on, for days and dollars: 32e12 (default: the recipe's steps)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="override a value; may be repeated")
    plan_compile.configure(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the plan; 0 if it fits, 1 if it does not.

    Raises:
        ValueError: a mistake in the recipe or the arguments, or a compiled step that does not fit.
    """
    from v4train import recipe as recipe_lib
    from v4train.plan import estimate, machine, report, search

    if args.compile != bool(args.target):
        raise ValueError("--compile needs --target, the devices to compile for, and --target needs --compile: v4train plan RECIPE --help")
    if not (args.chips or args.target):
        raise ValueError("name the machine: --chips H200x512 (chip and number), or --chips v5p:8x8x8 (a topology)")
    if args.search and args.compile:
        raise ValueError("--search ranks meshes by estimate and --compile compiles the recipe's: use one of them, then --set the mesh")
    if args.chips and args.target and not args.target.startswith("cpu"):
        named, compiled = machine.parse(args.chips), machine.parse(args.target, option="--target")
        if (named.name, named.devices, named.slices) != (compiled.name, compiled.devices, compiled.slices):
            raise ValueError(
                f"--chips {args.chips} and --target {args.target} are different machines, whose figures would stand side by side; leave "
                "out --chips, and the estimate is for the target"
            )
    if args.top < 1:
        raise ValueError(f"--top {args.top} must be 1 or more")
    loaded = recipe_lib.resolve(args.recipe, overrides=args.overrides)
    if not args.chips and args.target.startswith("cpu"):
        return _compile(args, loaded.config, None)
    on = machine.parse(args.chips) if args.chips else machine.parse(args.target, option="--target")
    if args.search:
        return _search(args, loaded.config, on)
    plan = estimate.estimate(loaded.config, on=on, price=args.price, tokens=args.tokens)
    remedy = None if plan.fits else search.smallest_change(loaded.config, on=on)
    if not args.json:
        from v4train.cli import plan_text

        plan_text.show(plan, remedy=remedy)
    if args.compile:
        return _compile(args, loaded.config, plan, remedy=remedy)
    if args.json:
        print(json.dumps(report.as_json(plan, remedy=remedy), indent=1))
    return 0 if plan.fits else 1


def _search(args: argparse.Namespace, recipe: Any, on: Any) -> int:
    from v4train.plan import report, search

    found = search.ranked(recipe, on=on, top=args.top)
    if args.json:
        print(json.dumps({"candidates": report.candidates_as_json(found)}, indent=1))
    else:
        from v4train.cli import plan_text

        plan_text.show_candidates(found, recipe=recipe, on=on)
    return 0 if found[0].fits else 1


def _compile(args: argparse.Namespace, recipe: Any, plan: Any, *, remedy: Any = None) -> int:
    from v4train.cli import plan_compile
    from v4train.plan import report

    compiled = plan_compile.run(recipe, target=args.target, until=args.until)
    beside = None
    if plan is not None:
        held = plan.phases[0].memory
        beside = {"total": held.total, "arguments": held.state, "temporaries": held.total - held.state}
    if args.json:
        ours = {} if plan is None else report.as_json(plan, remedy=remedy)
        print(json.dumps(ours | {"compiler": compiled.as_json()}, indent=1))
    else:
        print(plan_compile.table(compiled, estimate=beside))
    compiled.check()
    return 0
