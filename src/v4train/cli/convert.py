"""``v4train convert import DIR OUT`` and ``v4train convert export RUN_OR_STEP DIR``: open weights in, open weights out.

An import is a directory like that of a run, with a recipe and one step: what takes a run takes it, and training begins with ``init_from``.
An export is a directory that `transformers` loads. Both appear under their names only when they are complete.
"""

import argparse
import errno
import importlib.metadata
import math
import os
import pathlib
import shutil
import sys
from typing import Any

PRECISIONS = {"fp32": "fp32", "bf16": "bf16", "fp8": "base", "fp4-fp8": "instruct"}
"""``--format`` -> the name of the released layout (`interop.names.Precision`)."""

_FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    choices = parser.add_subparsers(dest="direction", metavar="<direction>", required=True, title="directions")
    into = choices.add_parser("import", help="a released checkpoint becomes one of ours", allow_abbrev=False)
    into.add_argument("directory", metavar="DIR", help="the released layout: config.json and safetensors files")
    into.add_argument("out", metavar="OUT", help="directory to make, laid out like a run's: recipe.yaml, checkpoints/step_00000000")
    into.add_argument("--base", metavar="RECIPE", help="recipe for everything but the model (default: DIR's own, or a gentle fine-tuning)")
    into.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="override a value; may be repeated")
    out = choices.add_parser("export", help="one of our checkpoints becomes open weights", allow_abbrev=False)
    out.add_argument("source", metavar="RUN_OR_STEP", help="a run directory (its newest good step), or one step of it")
    out.add_argument("directory", metavar="DIR", help="directory to make: config.json, safetensors files, tokenizer, model card")
    out.add_argument("--format", choices=PRECISIONS, default="bf16", help="number formats of the weights (default: bf16)")
    out.add_argument("--shard-gb", type=float, default=5.0, metavar="N", help="most gigabytes of tensors in a file (default: 5)")
    for one in (into, out):
        one.add_argument("--no-verify", action="store_true", help="do not compare digests before reading")
        one.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the stack trace of an error")


def run(args: argparse.Namespace) -> int:
    """Converts; 0 when done, 2 when the input is wrong or the disk is full: then nothing is left of the output.

    Raises:
        ValueError: what is wrong.
    """
    try:
        return {"import": _import, "export": _export}[args.direction](args)
    except (ValueError, OSError) as error:
        if getattr(args, "debug", False) or not any(text in str(error) for text in _FULL):
            raise
        # To the command line a full disk is a failure of the machine; to a conversion it is an output that was chosen badly.
        print(f"v4train: {error}; nothing was written", file=sys.stderr)
        return 2


def _import(args: argparse.Namespace) -> int:
    from v4train.cli import convert_progress, convert_recipe
    from v4train.config import dump
    from v4train.interop import importing, tensor_files, tokenizer_files
    from v4train.interop import released as released_lib

    out = pathlib.Path(args.out)
    with tensor_files.complete_directory(out) as temporary:
        released = released_lib.Released.open(args.directory)
        recipe = convert_recipe.for_import(released, out=out, base=args.base, overrides=args.overrides)
        verified = _verify(released) if not args.no_verify else "digests not compared"
        imported = {"from": released.directory.absolute().name, "tensors": len(released.sources)}
        values = {"recipe": dump.values(recipe), "data": "", "seed": recipe.seed, "imported": imported}
        with convert_progress.Progress("importing", nbytes=importing.step_bytes(released.model)) as progress:
            importing.write_step(released, temporary / "checkpoints", values=values, progress=progress)
        convert_recipe.write(temporary, recipe)
        for name in (tokenizer_files.TOKENIZER, tokenizer_files.CONFIG):
            if (released.directory / name).is_file():
                shutil.copyfile(released.directory / name, temporary / name)
    print(f"imported {len(released.sources):,} tensors of {released.directory}: {progress.summary}; {verified}")
    print(f"{out}: checkpoints/step_00000000, recipe.yaml. To train on: v4train train {out / convert_recipe.OWN}")
    return 0


def _verify(released: Any) -> str:
    from v4train.cli import convert_progress

    with convert_progress.Progress("comparing digests", nbytes=1) as progress:
        compared = released.verify(progress=progress.reached)
    return f"{compared} files have the digests of checksums.json" if compared else "there is no checksums.json to compare digests with"


def _export(args: argparse.Namespace) -> int:
    from v4train.checkpoint import restore, step_directory, streaming
    from v4train.cli import convert_progress, convert_recipe
    from v4train.interop import exporting, importing, names, tensor_files

    if not 0 < args.shard_gb < math.inf:
        raise ValueError(f"--shard-gb {args.shard_gb}: give a positive number of gigabytes")
    checkpoints, step = step_directory.locate(pathlib.Path(args.source))
    found = restore.describe(checkpoints, step=step, verify=not args.no_verify)
    where = step_directory.path(checkpoints, step=found.step)
    recipe = convert_recipe.from_checkpoint(found.metadata, subject=str(where))
    precision: names.Precision = PRECISIONS[args.format]  # pyright: ignore[reportAssignmentType]
    directory, shard_bytes = pathlib.Path(args.directory), int(args.shard_gb * 1e9)
    with tensor_files.complete_directory(directory) as temporary:
        tokens = _write_tokenizer(temporary, recipe, beside=checkpoints.parent)
        exporting.write_config(temporary, model=recipe.model, precision=precision, tokens=tokens)
        reader = streaming.Reader(where)
        with convert_progress.Progress("exporting", nbytes=importing.step_bytes(recipe.model)) as progress:
            rows = exporting.write_weights(
                reader, temporary, model=recipe.model, precision=precision, shard_bytes=shard_bytes, progress=progress
            )
        (temporary / convert_recipe.OWN).write_text(convert_recipe.text(recipe), encoding="utf-8")
        (temporary / "README.md").write_text(_card(recipe, found, rows, precision), encoding="utf-8")
    for damaged, reason in found.skipped:
        print(f"the checkpoint of step {damaged} is damaged and was not used: {reason}")
    print(exporting.table(rows))
    if misread := exporting.misread_by_transformers(recipe.model, precision=precision):
        print(
            f"note: `transformers` cannot read {len(misread)} of these FP8 matrices, whose sides are above 128 and no multiples of it "
            f"(the first is {misread[0]}); export as bf16 for it"
        )
    print(f"exported step {found.step} of {checkpoints.parent} to {directory} as {args.format}: {progress.summary}")
    return 0


def _write_tokenizer(directory: pathlib.Path, recipe: Any, *, beside: pathlib.Path) -> Any:
    """Writes the tokenizer's files: those that came with an import, the file of a tokenizer that has one, or those of the bytes."""
    from v4train.data import tokenizer as tokenizer_lib
    from v4train.interop import released_config, tokenizer_files

    tokenizer = tokenizer_lib.build(recipe.data.tokenizer)
    own = getattr(recipe.data.tokenizer, "path", None)
    if (beside / tokenizer_files.TOKENIZER).is_file():
        tokenizer_files.copy(beside / tokenizer_files.TOKENIZER, directory)
    elif own is not None:
        tokenizer_files.copy(pathlib.Path(own), directory)
    else:
        assert isinstance(tokenizer, tokenizer_lib.ByteTokenizer), type(tokenizer)
        special = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad}
        tokenizer_files.write_bytes(directory, names=tokenizer.names, special=special, longest=recipe.model.max_positions)
    return released_config.TokenIds(bos=tokenizer.bos, eos=tokenizer.eos, pad=tokenizer.pad)


def _card(recipe: Any, found: Any, rows: Any, precision: Any) -> str:
    from v4train.core import param
    from v4train.data import store
    from v4train.interop import model_card
    from v4train.model import count, transformer

    sources = []
    for source in recipe.data.sources:
        try:
            manifest = store.TokenStore.open(source.path).manifest
        except (ValueError, OSError):
            manifest = {}
        sources.append(model_card.Source(source.name, source.weight, manifest.get("licence", ""), manifest.get("origin", "")))
    training = model_card.Training(
        name=recipe.name,
        steps=found.step,
        tokens=found.step * recipe.tokens_per_step,
        row=recipe.data.sequence_length,
        sources=sources,
        begun_from=recipe.init_from or "",
        imported=found.metadata.get("imported", {}).get("from", ""),
    )
    counted = count.parameters(param.declarations(transformer.Transformer(recipe.model)), top_k=recipe.model.moe.top_k)
    try:
        version = importlib.metadata.version("v4train")
    except importlib.metadata.PackageNotFoundError:
        version = "(from its sources)"
    return model_card.text(recipe.model, precision=precision, counted=counted, training=training, rows=rows, version=version)
