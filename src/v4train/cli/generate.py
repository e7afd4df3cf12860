"""``v4train generate CHECKPOINT --prompt TEXT``: continues a prompt of text, images and sound; the answer appears while it is made.

The prompt is put together as training data are: media first, in the order they are given, then the text. The answer goes to the standard
output and everything else to the standard error, so that a pipe gets the answer alone.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import sys
import time
from typing import Any

from v4train.cli import decode_options

_MEDIA = "media"


class _Media(argparse.Action):
    """Keeps ``--image`` and ``--audio`` in one list, in their order."""

    def __call__(self, parser, namespace, values, option_string=None):
        found = [*(getattr(namespace, _MEDIA, None) or []), (self.dest, str(values))]
        setattr(namespace, _MEDIA, found)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="run directory, one step of it, import, or directory in the released layout"
    )
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", metavar="TEXT", help="text to continue (default: none, a document from its beginning)")
    text.add_argument("--prompt-file", metavar="FILE", help="file with the text, UTF-8; - is the standard input")
    parser.set_defaults(**{_MEDIA: ()})
    for kind in ("image", "audio"):
        parser.add_argument(f"--{kind}", action=_Media, metavar="FILE", help=f"{kind} file before the text; may be repeated")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="most tokens of the answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0: always the most likely token (default: 1)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the most likely tokens with this mass (default: 1)"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from so many likeliest tokens (default: 0, all)")
    parser.add_argument("--seed", type=int, metavar="S", help="of the draws (default: another one each time; it is shown)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    decode_options.configure(parser)


def run(args: argparse.Namespace) -> int:
    """Generates.

    Raises:
        ValueError: a checkpoint, prompt or option that cannot be used.
    """
    words = _text(args)
    decode_options.check(args, "max_tokens")
    from v4train.data.prepare import record
    from v4train.decode import engine, request

    loaded = decode_options.load(args)
    patches = decode_options.image_patches(args, loaded)
    media = [record.Media(kind, pathlib.Path(name)) for kind, name in args.media]
    prompt = loaded.prompt([*media, *([words] if words else [])], image_patches=patches)
    decoder = _decoder(args, loaded, tokens=len(prompt) + args.max_tokens)
    asked = request.Request(
        prompt,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        stop=tuple(args.stop),
    )
    with contextlib.closing(decoder), engine.Engine(decoder, tokenizer=loaded.tokenizer) as running:
        shown = _show(running.submit(asked))
        cache = sum(running.scheduler.cache_bytes().values())
    more = f", {shown.drafts}" if decoder.config.speculate else ""
    more += f", {shown.cached} prompt tokens taken up" if decoder.config.prefix_bytes else ""
    drawn = f", seed {shown.seed}" if args.temperature > 0 else ""
    step = "" if loaded.step is None else f" step {loaded.step}"
    said = f"{loaded.name}{step}: {len(prompt)} prompt tokens, {shown.speed}; ended by {shown.reason}"
    print(f"{said}; cache {cache:,} bytes ({decoder.config.cache}){more}{drawn}", file=sys.stderr)
    return 0


@dataclasses.dataclass(frozen=True)
class _Shown:
    """What is said of an answer that was printed."""

    reason: str
    seed: int
    times: list[float]  # seconds until each token
    drafts: str
    cached: int

    @property
    def speed(self) -> str:
        """The first step is compiled for the second token, so speed is measured from there on."""
        text = f"{len(self.times)} tokens"
        if self.times:
            text += f", the first after {self.times[0]:.1f} s (compilation included)"
        if len(self.times) > 2:
            text += f", {(len(self.times) - 2) / (self.times[-1] - self.times[1]):.1f} tokens/s"
        return text


def _text(args: argparse.Namespace) -> str:
    if args.prompt_file is None:
        return args.prompt or ""
    try:
        content = sys.stdin.buffer.read() if args.prompt_file == "-" else pathlib.Path(args.prompt_file).read_bytes()
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file {args.prompt_file} is not UTF-8 (byte {error.start}): convert it") from None


def _decoder(args: argparse.Namespace, loaded: Any, *, tokens: int) -> Any:
    """One slot, as long as this answer needs."""
    longest = loaded.model.max_positions
    if tokens > longest:
        raise ValueError(
            f"a prompt of {tokens - args.max_tokens} tokens and --max-tokens {args.max_tokens}: the model {loaded.name} was made "
            f"for {longest} tokens together"
        )
    page = decode_options.page_tokens(loaded)
    # Whole pages, so that a few more tokens of a prompt do not compile everything anew.
    length = min(-(-tokens // page) * page, longest)
    # A power of two, so that a short prompt is not padded to a long chunk and still few shapes are compiled.
    chunk = min(loaded.decode.prefill_chunk, max(16, 1 << (tokens - args.max_tokens - 1).bit_length()))
    return decode_options.decoder(args, loaded, slots=1, max_length=length, prefill_chunk=chunk)


def _show(stream: Any) -> _Shown:
    """Prints the answer as it comes."""
    began, times, last, reason = time.monotonic(), [], "", ""
    for event in stream:
        if event.token is not None:
            times.append(time.monotonic() - began)
        if event.text:
            last = event.text
            sys.stdout.write(event.text)
            sys.stdout.flush()
        reason = event.finish_reason or ""
    if not last.endswith("\n"):
        print(flush=True)
    return _Shown(reason, stream.seed, times, f"{stream.accepted} of {stream.drafted} drafts right", stream.cached_tokens)
