"""``v4train bench decode <what>``: memory, speed, latency and quality of decoding."""

import argparse
import importlib
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

_NEEDLE = "configs/bench/needle.yaml"


def configure(choices: Any) -> None:
    """Adds the measurements to those of ``v4train bench``."""
    decode = choices.add_parser(
        "decode",
        help="memory, speed and quality of decoding",
        description="Measure decoding with different caches.",
        allow_abbrev=False,
    )
    kinds = decode.add_subparsers(dest="decode", metavar="<what>", required=True, title="measurements")
    memory = kinds.add_parser("memory", help="bytes of V4-Flash's cache by length and tier", allow_abbrev=False)
    memory.add_argument("--lengths", metavar="N,N", default="4096,8192,32768,131072,1048576", help="tokens (default: %(default)s)")
    memory.add_argument("--hot-entries", type=int, default=1024, metavar="N", help="of a layer on the device, with tiers (default: 1024)")
    speed = kinds.add_parser("speed", help="time of attention and of whole steps by length", allow_abbrev=False)
    speed.add_argument(
        "--lengths", metavar="N,N", default="4096,8192,32768,131072", help="for attention alone; none: not (default: %(default)s)"
    )
    speed.add_argument("--step-lengths", metavar="N,N", default="32768,131072", help="for steps of a batch (default: %(default)s)")
    speed.add_argument("--growth-lengths", metavar="N,N", default="4096,131072,1048576", help="for one sequence (default: %(default)s)")
    speed.add_argument("--batch", metavar="N,N", default="16", help="sequences of a step (default: %(default)s)")
    speed.add_argument(
        "--widths",
        choices=("true", "small"),
        default="true",
        help="small: heads, index, top-k and window stay V4-Flash's, the hidden width and ranks are small (default: %(default)s)",
    )
    speed.add_argument("--rounds", type=int, default=9, metavar="N", help="turns; medians are printed (default: 9)")
    speed.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="change the model; may be repeated")
    latency = kinds.add_parser(
        "latency", help="memory by tier, time per token and to the first token, with and without tiers", allow_abbrev=False
    )
    latency.add_argument("--lengths", metavar="N,N", default="4096,32768,131072", help="tokens (default: %(default)s)")
    latency.add_argument(
        "--prompts", metavar="N,N", default="4096,32768", help="of these, lengths of prompts; none: not (default: %(default)s)"
    )
    latency.add_argument("--hot-entries", type=int, default=1024, metavar="N", help="of a layer on the device, with tiers (default: 1024)")
    latency.add_argument("--rounds", type=int, default=7, metavar="N", help="steps; medians are printed (default: 7)")
    latency.add_argument("--chunk", type=int, default=2048, metavar="N", help="tokens of a prompt at a time (default: 2048)")
    latency.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="change the model; may be repeated")
    quality = kinds.add_parser("quality", help="perplexity, index recall and needles with an fp8 cache", allow_abbrev=False)
    quality.add_argument("--config", metavar="RECIPE", default=_NEEDLE, help="of the run (default: %(default)s)")
    quality.add_argument("--run", metavar="DIR", help="a trained run (default: that of the recipe; the needle model is trained first)")
    quality.add_argument("--documents", type=int, default=64, metavar="N", help="held-out texts (default: 64)")
    quality.add_argument("--lengths", metavar="N,N", default="256,512,1024", help="of haystacks, tokens (default: %(default)s)")
    quality.add_argument("--tries", type=int, default=20, metavar="N", help="needles of each length and depth (default: 20)")
    million = kinds.add_parser("million", help="a prompt of a million tokens, computed and found on disk", allow_abbrev=False)
    million.add_argument("--tokens", type=int, default=2**20, metavar="N", help="of the prompt (default: 1048576)")
    million.add_argument("--chunk", type=int, default=2048, metavar="N", help="tokens that are processed at a time (default: 2048)")
    million.add_argument("--directory", metavar="DIR", help="for the disk tier, empty (default: a temporary directory)")
    for one in (memory, speed, latency, quality, million):
        one.add_argument("--json", action="store_true", help="print JSON instead of a table")
        one.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the stack trace of an error")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; returns 0.

    Raises:
        ValueError: a mistake in the arguments, or a model that cannot be measured.
    """
    acts: dict[str, Callable[[argparse.Namespace], dict[str, Any]]]
    acts = {"memory": _memory, "speed": _speed, "latency": _latency, "quality": _quality, "million": _million}
    machine = importlib.import_module("v4train.bench.machine")
    before = machine.load_average()
    result = acts[args.decode](args)
    result = {"bench": f"decode {args.decode}", **machine.describe(devices=1), "load_before": before, **result}
    if args.json:
        print(json.dumps(result, indent=1))
    elif args.decode == "million":
        print(importlib.import_module("v4train.bench.decode.million").table(result))
    else:
        print(getattr(importlib.import_module("v4train.bench.decode.report"), args.decode)(result))
    return 0


def _memory(args: argparse.Namespace) -> dict[str, Any]:
    filled, memory = (importlib.import_module(f"v4train.bench.decode.{name}") for name in ("filled", "memory"))
    return memory.measure(filled.model(whole=True), lengths=_lengths(args.lengths), hot_entries=args.hot_entries)


def _speed(args: argparse.Namespace) -> dict[str, Any]:
    filled, speed = (importlib.import_module(f"v4train.bench.decode.{name}") for name in ("filled", "speed"))
    lengths = {name: _lengths(getattr(args, name)) for name in ("lengths", "step_lengths", "growth_lengths")}
    model = filled.model(widths=args.widths, overrides=args.overrides)
    return speed.measure(model, **lengths, batches=_lengths(args.batch), rounds=args.rounds, say=_say)


def _latency(args: argparse.Namespace) -> dict[str, Any]:
    filled, latency = (importlib.import_module(f"v4train.bench.decode.{name}") for name in ("filled", "latency"))
    model, lengths, prompts = filled.model(overrides=args.overrides), _lengths(args.lengths), _lengths(args.prompts)
    return latency.measure(
        model, lengths=lengths, prompt_lengths=prompts, hot=args.hot_entries, rounds=args.rounds, chunk=args.chunk, say=_say
    )


def _quality(args: argparse.Namespace) -> dict[str, Any]:
    from v4train import recipe as recipe_lib

    recipe = recipe_lib.resolve(args.config).config
    run = args.run or recipe.run_directory
    if args.config == _NEEDLE and args.run is None:
        _train_needle(recipe)
    quality = importlib.import_module("v4train.bench.decode.quality")
    return quality.measure(run, recipe, count=args.documents, lengths=_lengths(args.lengths), tries=args.tries, say=_say)


def _million(args: argparse.Namespace) -> dict[str, Any]:
    return importlib.import_module("v4train.bench.decode.million").measure(args.directory, tokens=args.tokens, chunk=args.chunk)


def _train_needle(recipe: Any) -> None:
    """Prepares the data of the needle model and trains it, as far as that was not done."""
    data = pathlib.Path(recipe.data.sources[0].path)
    if not data.exists():
        _say(f"writing {data}")
        importlib.import_module("v4train.bench.decode.needle").write_store(data, documents=40_000, length=126)
    done = subprocess.run([sys.executable, "-m", "v4train.train", "--config", _NEEDLE], stdout=sys.stderr, check=False)
    if done.returncode:
        raise ValueError(f"the training of {_NEEDLE} ended with exit code {done.returncode}; its own message stands above")


def _lengths(text: str) -> tuple[int, ...]:
    if text.strip() == "none":
        return ()
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isascii() and word.isdigit() and int(word) > 1 for word in words):
        raise ValueError(f"{text!r}: give whole numbers of tokens above 1, separated by commas")
    return tuple(sorted({int(word) for word in words}))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
