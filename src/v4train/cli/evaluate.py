"""``v4train evaluate CHECKPOINT``: asks a saved model what a run asks on its way: held-out text, questions with choices, needles.

Without options it measures the held-out loss on the checkpoint's own data. It runs on one device, in the phase of attention that the
checkpoint's last step was trained in.
"""

import argparse
import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from v4train.train.evals import choices, needle, probes

_PLACES = 16_384
"""Tokens of a batch, unless a row is longer."""
_ROW = 4096
"""Tokens of a row where no recipe says how long rows are."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="run directory, one step of it, import, or directory in the released layout"
    )
    parser.add_argument("--choices", action="append", default=[], metavar="FILE", help="questions as JSON lines; may be repeated")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first questions of each file")
    parser.add_argument("--cut", action="store_true", help="drop the beginning of a context that is too long, instead of refusing it")
    parser.add_argument("--needle", action="store_true", help="hide facts in a text and ask for them, by length and depth")
    parser.add_argument("--lengths", type=_numbers(int), metavar="N,N", help="of needle documents, in tokens (default: a row's, 1/2, 1/4)")
    parser.add_argument("--depths", type=_numbers(float), default=(0.0, 0.25, 0.5, 0.75, 1.0), metavar="D,D", help="0 begin, 1 end")
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="documents for each length and depth (default: 4)")
    parser.add_argument("--needle-text", metavar="FILE", help="text to hide facts in (default: held-out text, or made-up sentences)")
    parser.add_argument("--heldout", action="store_true", help="held-out loss by source and modality; the default if nothing else is asked")
    parser.add_argument("--batches", type=int, metavar="N", help="held-out batches a source (default: as in training)")
    parser.add_argument("--length", type=int, metavar="N", help=f"tokens of a row (default: as in training, or {_ROW})")
    parser.add_argument(
        "--attention", choices=("dense", "sparse"), help="phase of CSA layers (default: that of the checkpoint's last step)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, with the scores of every choice")


def run(args: argparse.Namespace) -> int:
    """Evaluates and prints.

    Raises:
        ValueError: a checkpoint, a file or an option that cannot be used.
    """
    for name in ("limit", "samples", "batches", "length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: give at least 1")
    from v4train.core import compiler
    from v4train.decode import loading
    from v4train.train.evals import probes, saved

    compiler.keep_programs()
    about = saved.about(args.checkpoint)
    loaded = loading.load(args.checkpoint)
    model = saved.in_phase(loaded.model, args.attention or about.attention)
    length = args.length or about.sequence_length or min(_ROW, model.max_positions)
    heldout = args.heldout or not (args.choices or args.needle)
    wants_text = heldout or (args.needle and args.needle_text is None)
    data = about.open_data(required=heldout) if wants_text else None
    asked = probes.Probes(
        _asked(args, length=length, longest=model.max_positions),
        tokenizer=loaded.tokenizer,
        numerics=loaded.numerics,
        mesh=saved.one_device(),
        rows=max(_PLACES // length, 1),
        length=length,
        hay=lambda tokens: None if data is None else probes.held_out(data, tokens=tokens),
    )
    fields: dict[str, float] = {}
    if heldout:
        assert data is not None
        fields = saved.losses(model, loaded.params, numerics=loaded.numerics, data=data, about=about, batches=args.batches)
    answers = [asked.ask(probe, model=model, params=loaded.params) for probe in asked.probes]
    said = {"checkpoint": str(args.checkpoint), "name": loaded.name, "step": loaded.step, "attention": args.attention or about.attention}
    if args.json:
        print(json.dumps({**said, "heldout": fields, "evaluations": {answer.label: _json(answer) for answer in answers}}, allow_nan=False))
        return 0
    at = "" if loaded.step is None else f" step {loaded.step}"
    print(f"{loaded.name}{at}" + (f", {said['attention']} attention" if said["attention"] else ""))
    print("\n".join([*_told(fields), *(line for answer in answers for line in _lines(answer))]))
    return 0


def _numbers(kind: type) -> Any:
    def parse(text: str) -> tuple:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: write numbers with commas between them") from None

    return parse


def _asked(args: argparse.Namespace, *, length: int, longest: int) -> list[Any]:
    from v4train.train.evals import config

    names = [pathlib.Path(path).stem for path in args.choices]
    asked: list[Any] = [
        config.MultipleChoiceConfig(
            name=None if names.count(name) == 1 else f"{name}-{i}", path=path, limit=args.limit, long="cut" if args.cut else "refuse"
        )
        for i, (name, path) in enumerate(zip(names, args.choices, strict=True))
    ]
    if args.needle:
        lengths = args.lengths or tuple(sorted({max(length // 4, 128), max(length // 2, 128), length}))
        if (largest := max(lengths)) > longest:
            raise ValueError(
                f"--lengths {largest}: the model was made for {longest} positions (model.max_positions); leave longer ones out"
            )
        if min(lengths) < 1 or not all(0 <= depth <= 1 for depth in args.depths):
            raise ValueError(f"--lengths {min(lengths)}, --depths {args.depths}: lengths are at least 1, and depths from 0 to 1")
        asked.append(config.NeedleConfig(lengths=lengths, depths=args.depths, samples=args.samples, text=args.needle_text))
    return asked


def _json(answer: "probes.Answer") -> dict[str, Any]:
    from v4train.train.evals import choices

    if isinstance(answer.result, choices.Result):
        told = dataclasses.asdict(answer.result)
        return {name: None if isinstance(value, float) and value != value else value for name, value in told.items()}
    return {"cells": [dataclasses.asdict(cell) for cell in answer.result]}


def _told(fields: dict[str, float]) -> list[str]:
    """The held-out loss, a line a source or modality."""
    lines = []
    for kind, what in (("bpb", "held-out"), ("modality_bpb", "held-out, documents of")):
        for name, value in fields.items():
            if name.startswith(f"{kind}/"):
                source = name.removeprefix(f"{kind}/")
                nats = f"  {fields[f'loss/{source}']:.4f} nats a target" if kind == "bpb" else ""
                lines.append(f"{what} {source}: {value:.4f} bits a byte{nats}")
    return lines


def _lines(answer: "probes.Answer") -> list[str]:
    from v4train.train.evals import choices

    if isinstance(answer.result, choices.Result):
        return [_of_choices(answer.label, answer.result)]
    return _of_needles(answer.label, answer.result)


def _of_choices(label: str, result: "choices.Result") -> str:
    def share(value: float, error: float) -> str:
        return f"{value:.1%}" + ("" if result.questions == 1 else f" ± {error:.1%}")

    plain, by_byte = share(result.accuracy, result.accuracy_error), share(result.accuracy_per_byte, result.accuracy_per_byte_error)
    return f"{label}: {plain} right, {by_byte} by byte, of {result.questions} questions" + (f", {result.cut} cut" if result.cut else "")


def _of_needles(label: str, cells: "list[needle.Cell]") -> list[str]:
    """A table: lengths down, depths across; share found and nats."""
    depths = list(dict.fromkeys(cell.depth for cell in cells))
    by_place = {(cell.length, cell.depth): cell for cell in cells}
    lines = [
        f"{label}, {cells[0].samples} samples a cell: share found, nats of the answer",
        "length  " + "".join(f"{d:>14g}" for d in depths),
    ]
    for length in dict.fromkeys(cell.length for cell in cells):
        row = (by_place[length, depth] for depth in depths)
        lines.append(f"{length:>8,}" + "".join(f"{cell.right:>7.0%} {cell.nats:>6.2f}" for cell in row))
    return lines
