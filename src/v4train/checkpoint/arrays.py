"""The arrays of a step: our adapter to Orbax, and the only file that knows it.

**Names.** The state is any pytree of `jax.Array`; on disk it is a flat table, name -> array, where the name is the path
(``params/layers/attention/w``, ``optimizer/mu/embed``). So what is stored does not depend on container types (a dict may become a
NamedTuple), empty nodes leave no trace, and a comparison with what a run expects is a comparison of two tables.

**Format.** OCDBT packs all arrays of a process into a few data files, Zarr 3 within it. Chunks are shards, cut to `CHUNK_BYTES` so
that a finer mesh does not read whole old shards for each new one; large arrays are cut along leading axes (layers, experts) first, so
that one matrix can be read without its neighbours (`streaming`). No compression: fp32 masters and moments are noise to it (7%
smaller) and it would cost more time than the disk does. Only replica 0 of an array is written. The sharding is *not* stored: the
reader brings its own.

**Copy.** `start_write` returns when the values are in host memory; from then on the device buffers may be donated. On the CPU backend
that "copy" is a view that holds on to the buffer, and donation then allocates instead of overwriting it.
"""

import asyncio
import functools
import logging
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp

CHUNK_BYTES = 32 * 2**20

Table = dict[str, dict[str, Any]]
"""Name -> ``{"shape": [...], "dtype": "bfloat16"}``."""


def flatten(tree: Any) -> dict[str, Any]:
    """Name -> leaf, in tree order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two leaves have the same name: a key contains a slash"
    return named


def describe(named: dict[str, Any]) -> Table:
    """Shapes and types of named arrays (or `jax.ShapeDtypeStruct`)."""
    return {name: {"shape": list(leaf.shape), "dtype": jnp.dtype(leaf.dtype).name} for name, leaf in named.items()}


def prepare() -> None:
    """Imports Orbax (0.4 s), so that the first save does not have to."""
    _handler()


def start_write(named: dict[str, jax.Array], directory: pathlib.Path) -> list:
    """Copies arrays to host memory, and starts to write them.

    Returns:
        Futures; call ``result()`` of each, then `finish_write` on the first host.
    """
    import orbax.checkpoint as ocp
    from etils import epath

    # An array without elements has no chunks, which Orbax refuses; its row in the table says all there is to know.
    stored = {name: leaf for name, leaf in named.items() if leaf.size}
    save_args = {
        name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=tuple(range(leaf.ndim - 2)) if leaf.nbytes > CHUNK_BYTES else ())
        for name, leaf in stored.items()
    }
    return asyncio.run(_handler().async_save(epath.Path(directory), args=ocp.args.PyTreeSave(stored, save_args=save_args))) or []


def finish_write(directory: pathlib.Path) -> None:
    """Joins the parts that the processes wrote. They stay where they are and are referred to."""
    from etils import epath

    _handler().finalize(epath.Path(directory))


def tree_metadata(table: Table) -> dict[str, Any]:
    """What Orbax writes into ``_METADATA`` next to arrays of these names, and reads before them."""
    value = {"value_type": "jax.Array", "skip_deserialize": False}
    tree = {str((name,)): {"key_metadata": [{"key": name, "key_type": 2}], "value_metadata": value} for name in table}
    return {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def written_by(name: str, *, host: int) -> bool:
    """Whether a file (relative to the step) was written by this host's `start_write`."""
    return f"ocdbt.process_{host}" in name.split("/")


def read(directory: pathlib.Path, *, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads named arrays onto the shardings given. All must be there with exactly these shapes; others are not read."""
    import orbax.checkpoint as ocp
    from etils import epath

    stored = {name: struct for name, struct in wanted.items() if struct.size}
    restore_args = {
        name: ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=struct.sharding, global_shape=struct.shape, dtype=struct.dtype)
        for name, struct in stored.items()
    }
    args = ocp.args.PyTreeRestore(stored, restore_args=restore_args, partial_restore=True)
    arrays = _handler().restore(epath.Path(directory), args=args)
    return {
        name: arrays[name] if struct.size else jnp.zeros(struct.shape, struct.dtype, device=struct.sharding)
        for name, struct in wanted.items()
    }


@functools.cache
def _handler() -> Any:
    import orbax.checkpoint as ocp

    _silence_failed_writes()
    # Replica-parallel writing slices arrays on the device, which compiles a program per shape and needs device memory.
    array_handler = ocp.type_handlers.ArrayHandler(use_replica_parallel=False, enable_write_sharding_file=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, array_handler))
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False, type_handler_registry=registry)


def _silence_failed_writes() -> None:
    """A write that fails (full disk) is reported once, in one line, by the manager; two others would report it hundreds of times."""
    # Orbax logs the stack trace in every thread that sees the error.
    logging.getLogger("absl").addFilter(lambda record: "_SignalingThread.run() raised an exception" not in str(record.msg))

    # Orbax closes its event loop at the first error; TensorStore then fails to tell it about each of the other writes.
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
            report(unraisable)

    sys.unraisablehook = report_others
