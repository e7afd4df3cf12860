"""Options of the commands that decode, `generate` and `serve`: what the cache is made of and what is computed with."""

import argparse
import dataclasses
import math
import re
from typing import Any

_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_HOST_BYTES = 2**30  # where a disk is named and host memory is not
_DISK_BYTES = 20 * 2**30
_PREFIX_BYTES = 2**28  # of a server, and where a disk is named
_NEEDS = {"hot_entries": "--host-cache or --disk-cache", "disk_cache_bytes": "--disk-cache"}


def size(text: str) -> int:
    """Bytes of ``512MiB`` and such, for argparse."""
    found = re.fullmatch(r"(\d+)\s*([KMGT]iB)?", text.strip())
    if found is None or not int(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes above 0: write 1000000, 512MiB or 20GiB")
    return int(found[1]) * _UNITS[found[2] or ""]


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options. What is not given is as the `decode` section of the checkpoint's recipe says, whose defaults are named here."""
    parser.add_argument("--cache", choices=("fp32", "bf16", "fp8"), help="format of compressed entries (default: the recipe's, bf16)")
    parser.add_argument(
        "--compute", choices=("float32", "bfloat16"), help="format of weights and activations (default: that of training, else bfloat16)"
    )
    parser.add_argument(
        "--chunk", type=int, metavar="N", help="tokens of a prompt that are processed at a time (default: the recipe's, 512)"
    )
    parser.add_argument(
        "--speculate",
        action=argparse.BooleanOptionalAction,
        help="draft with the model's MTP block: the same answers, in fewer steps (default: the recipe's, no)",
    )
    parser.add_argument(
        "--host-cache", type=size, metavar="BYTES", help="keep entries that an indexer selects from in host memory, at most so much of it"
    )
    parser.add_argument("--hot-entries", type=int, metavar="N", help="of these, on the device for each layer (default: the recipe's, 1024)")
    parser.add_argument(
        "--disk-cache", metavar="DIR", help="and on disk, where prompts' caches outlive the process (host: 1GiB if nothing says it)"
    )
    parser.add_argument("--disk-cache-bytes", type=size, metavar="BYTES", help="most bytes of DIR (default: the recipe's, 20GiB)")
    parser.add_argument("--no-tiers", action="store_true", help="everything on the device, whatever the recipe says of tiers")
    parser.add_argument(
        "--prefix-bytes",
        type=size,
        metavar="BYTES",
        help="host memory for taking up prompts that begin alike (default: the recipe's; 256MiB in a server and with a disk, else none)",
    )
    parser.add_argument(
        "--keep-answers",
        action=argparse.BooleanOptionalAction,
        help="take up answers too, for the next turn of a conversation: the same up to rounding only (default: the recipe's, no)",
    )
    parser.add_argument(
        "--no-program-cache", action="store_true", help="do not keep compiled programs in the user's cache directory for later runs"
    )
    parser.add_argument(
        "--image-patches", type=int, metavar="N", help="most patches of an image (default: 256, or those of a training row)"
    )


def check(args: argparse.Namespace, *names: str) -> None:
    """Raises ValueError for numbers below 1, of these options and of those added here, and for options that exclude each other."""
    tiers = [name for name in ("host_cache", "disk_cache", "hot_entries", "disk_cache_bytes") if getattr(args, name) is not None]
    if args.no_tiers and tiers:
        raise ValueError(f"--no-tiers and --{tiers[0].replace('_', '-')}: give one of them")
    for name in ("chunk", "image_patches", "hot_entries", *names):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give at least 1")


def load(args: argparse.Namespace) -> Any:
    """The checkpoint of the command line.

    Raises:
        ValueError: it cannot be read, or has no MTP block to draft with.
    """
    from v4train.core import compiler
    from v4train.decode import loading

    if not args.no_program_cache:
        compiler.keep_programs()
    loaded = loading.load(args.checkpoint, mtp=args.speculate)
    if args.speculate and loaded.model.mtp is None:
        raise ValueError(f"--speculate: the model {loaded.name} has no MTP block to draft with (model.mtp is null): leave it out")
    return dataclasses.replace(loaded, decode=_merged(args, loaded.decode))


def _merged(args: argparse.Namespace, said: Any) -> Any:
    """The recipe's section with the options that were given laid over it."""
    from v4train.decode import config

    names = {"cache": "cache", "chunk": "prefill_chunk", "speculate": "speculate", "prefix_bytes": "prefix_bytes"}
    names |= {name: name for name in ("slots", "max_length", "device_bytes", "keep_answers") if hasattr(args, name)}
    given = {field: getattr(args, name) for name, field in names.items() if getattr(args, name) is not None}
    tiers = None if args.no_tiers else said.tiers
    disk = None if tiers is None else tiers.disk
    if args.disk_cache is not None:
        disk = config.DiskConfig(path=args.disk_cache, bytes=_DISK_BYTES if disk is None else disk.bytes)
    if disk is not None and args.disk_cache_bytes is not None:
        disk = disk.model_copy(update={"bytes": args.disk_cache_bytes})
    if tiers is None and (args.host_cache is not None or disk is not None):
        tiers = config.TiersConfig(host_bytes=_HOST_BYTES)
    if tiers is None or (disk is None and args.disk_cache_bytes is not None):
        idle = [name for name in ("hot_entries", "disk_cache_bytes") if getattr(args, name) is not None]
        if idle:
            raise ValueError(f"--{idle[0].replace('_', '-')}: it means nothing without {_NEEDS[idle[0]]}: add it, or leave this out")
    if tiers is not None:
        sizes = {"host_bytes": args.host_cache, "hot_entries": args.hot_entries}
        tiers = tiers.model_copy(update={"disk": disk} | {name: value for name, value in sizes.items() if value is not None})
    return said.model_copy(update=given | {"tiers": tiers})


def image_patches(args: argparse.Namespace, loaded: Any) -> int:
    """Most patches of an image."""
    return args.image_patches or min(256, loaded.patches_per_row or 256)


def page_tokens(loaded: Any) -> int:
    """Tokens of a page: 256, or more where a layer's ratio does not divide it."""
    return math.lcm(256, *(ratio for ratio in loaded.model.compress_ratios if ratio))


def decoder(args: argparse.Namespace, loaded: Any, *, reuse: bool = False, **sizes: Any) -> Any:
    """A decoder with these options; its `close` is the caller's to call.

    Args:
        reuse: prompts that begin alike are to be expected.
        sizes: the rest of `decode.config.DecodeConfig`.
    """
    from v4train.decode import config
    from v4train.decode import decoder as decoder_lib
    from v4train.numerics import config as numerics_config

    said = loaded.decode
    prefix_bytes = said.prefix_bytes
    if prefix_bytes is None:
        prefix_bytes = _PREFIX_BYTES if reuse or said.keep_answers or (said.tiers is not None and said.tiers.disk is not None) else 0
    sizes |= {"cache": said.cache, "page_tokens": page_tokens(loaded), "tiers": said.tiers, "prefix_bytes": prefix_bytes}
    made = config.DecodeConfig(speculate=said.speculate, keep_answers=said.keep_answers, **sizes)
    numerics = loaded.numerics if args.compute is None else numerics_config.NumericsConfig(compute=args.compute)
    return decoder_lib.Decoder(loaded.model, loaded.params, config=made, numerics=numerics)
