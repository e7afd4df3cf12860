"""``v4train serve CHECKPOINT``: an HTTP server with OpenAI's interface on the decode engine; docs/serving.md."""

import argparse
import dataclasses
import importlib
import importlib.util
import os
import pathlib
import sys
from typing import Any

from v4train.cli import decode_options

_KEY = "V4TRAIN_API_KEY"
_LIBRARIES = ("starlette", "uvicorn", "jinja2", "prometheus_client")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="run directory, one step of it, import, or directory in the released layout"
    )
    parser.add_argument("--model-name", metavar="NAME", help="name that requests ask for (default: that of the recipe or directory)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0: one that is free (default: 8000)")
    parser.add_argument(
        "--api-key-file", metavar="FILE", help=f"file with the key that requests must bring (default: the variable {_KEY}, if it is set)"
    )
    parser.add_argument("--allow-without-key", action="store_true", help="listen beyond this machine although there is no key")
    parser.add_argument("--slots", type=int, metavar="N", help="requests that are answered together (default: the recipe's, 8)")
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="most tokens of prompt and answer (default: the recipe's; 4096, at most the model's)",
    )
    parser.add_argument(
        "--device-bytes",
        type=decode_options.size,
        metavar="BYTES",
        help="size of the cache (default: the recipe's; enough for every slot to reach --max-length)",
    )
    parser.add_argument("--waiting", type=int, default=64, metavar="N", help="requests that may wait for a slot; then 429 (default: 64)")
    parser.add_argument("--body-bytes", type=decode_options.size, default=16 * 2**20, metavar="BYTES", help="largest body (default: 16MiB)")
    parser.add_argument(
        "--drain-seconds", type=float, default=30.0, metavar="S", help="time for running answers after a signal to end (default: 30)"
    )
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja chat template (default: the one beside the tokenizer, if any)")
    parser.add_argument("--access-log", action="store_true", help="a line on the standard output for each response")
    decode_options.configure(parser)


def run(args: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT.

    Raises:
        ValueError: a checkpoint or option that cannot be used, or an address that is taken.
    """
    decode_options.check(args, "slots", "max_length", "waiting")
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"serve needs {', '.join(missing)}, not installed here: run `pip install 'v4train[serve]'`")
    runner = importlib.import_module("v4train.serve.runner")
    key, template = _key(args), _file(args.chat_template)
    config = _config(args, model=args.model_name or "-", key=key, patches=1)  # wrong options are said before weights are read
    with runner.bind(config) as listening:
        loaded = decode_options.load(args)
        if template is not None:
            loaded = dataclasses.replace(loaded, chat_template=template)
        config = _config(args, model=args.model_name or loaded.name, key=key, patches=decode_options.image_patches(args, loaded))
        decoder = decode_options.decoder(args, loaded, reuse=True, **_sizes(loaded))
        return runner.run(loaded, decoder, config=config, listening=listening, announce=_announce, access_log=args.access_log)


def _config(args: argparse.Namespace, *, model: str, key: str | None, patches: int) -> Any:
    import pydantic

    config = importlib.import_module("v4train.serve.config")
    try:
        return config.ServeConfig(
            model=model,
            host=args.host,
            port=args.port,
            api_key=None if key is None else pydantic.SecretStr(key),
            allow_without_key=args.allow_without_key,
            waiting=args.waiting,
            body_bytes=args.body_bytes,
            drain_seconds=args.drain_seconds,
            image_patches=patches,
        )
    except pydantic.ValidationError as error:
        texts = (
            f"{'.'.join(map(str, each['loc']))}: " * bool(each["loc"]) + each["msg"].removeprefix("Value error, ")
            for each in error.errors()
        )
        raise ValueError("; ".join(texts)) from None


def _sizes(loaded: Any) -> dict[str, Any]:
    longest, said = loaded.model.max_positions, loaded.decode
    if (said.max_length or 0) > longest:
        raise ValueError(f"--max-length {said.max_length}: the model {loaded.name} was made for {longest} tokens")
    length = said.max_length or min(4096, longest)
    chunk = min(said.prefill_chunk, length)
    return {"slots": said.slots, "max_length": length, "prefill_chunk": chunk, "device_bytes": said.device_bytes}


def _key(args: argparse.Namespace) -> str | None:
    if args.api_key_file is not None:
        return (_file(args.api_key_file) or "").strip()
    return os.environ.get(_KEY)


def _file(name: str | None) -> str | None:
    if name is None:
        return None
    try:
        return pathlib.Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 (byte {error.start}): convert it") from None


def _announce(text: str) -> None:
    print(f"v4train serve: {text}", file=sys.stderr, flush=True)
