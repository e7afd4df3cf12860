"""Blocks written one by one are a step like any other; a step like any other is read in blocks."""

import json
import math
import shutil
import tracemalloc

import jax
import numpy as np
import pytest

from tests.checkpoint.conftest import as_template, assert_same_bits, place
from v4train.checkpoint import arrays, config, restore, step_directory, streaming
from v4train.checkpoint.manager import Manager


def write(directory, values: dict[str, np.ndarray], **changes) -> None:
    with streaming.new_step(directory, step=3, table=arrays.describe(values), values={"seed": 1}) as writer:
        for name, value in reversed(values.items()):
            if value.ndim == 3:
                for i in range(len(value)):
                    writer.write(name, (i,), value[i])
            elif value.size:
                writer.write(name, (), value)


@pytest.fixture
def stacked(values):
    rng = np.random.default_rng(1)
    return {**arrays.flatten(values), "stack/w": rng.standard_normal((3, 16, 8), np.float32)}


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)])
def test_a_step_of_blocks_is_restored_on_any_mesh(tmp_path, stacked, mesh):
    write(tmp_path, stacked)
    flat = {name: value[0] if value.ndim == 3 else value for name, value in stacked.items()}
    wanted = {name: as_template(place(value, mesh)) for name, value in flat.items() if stacked[name].ndim < 3}
    split = jax.NamedSharding(wanted["params/w"].sharding.mesh, jax.P(None, "rows", "columns"))
    wanted["stack/w"] = jax.ShapeDtypeStruct((3, 16, 8), np.float32, sharding=split)
    restored = restore.restore(tmp_path, template={name: wanted[name] for name in sorted(wanted)})
    assert_same_bits(restored.state, {name: stacked[name] for name in sorted(stacked)})
    assert (restored.step, restored.metadata) == (3, {"seed": 1})


def test_the_metadata_are_those_that_orbax_writes(tmp_path, stacked):
    """Byte for byte: a later Orbax that wants more of them shows here."""
    write(tmp_path / "ours", stacked)
    with Manager(tmp_path / "theirs", config=config.CheckpointConfig()) as manager:
        manager.save(3, jax.tree.map(jax.numpy.asarray, dict(sorted(stacked.items()))), metadata={"seed": 1})
    ours, theirs = (json.loads((tmp_path / who / "step_00000003/arrays/_METADATA").read_text()) for who in ("ours", "theirs"))
    assert ours == theirs
    ours, theirs = (json.loads((tmp_path / who / "step_00000003/metadata.json").read_text()) for who in ("ours", "theirs"))
    assert ours == theirs


def test_blocks_of_a_trained_step(tmp_path, stacked, monkeypatch):
    """Of its own mesh's shards, and of arrays that are cut into several chunks."""
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 256)
    with Manager(tmp_path, config=config.CheckpointConfig()) as manager:
        state = place({name: value for name, value in stacked.items() if value.ndim < 3}, (2, 2))
        manager.save(5, state | {"stack/w": jax.numpy.asarray(stacked["stack/w"])}, metadata={})
        assert manager.last_error is None
    reader = streaming.Reader(tmp_path / "step_00000005")
    for name, value in stacked.items():
        assert reader.read(name).tobytes() == value.tobytes()
    assert reader.read("stack/w", (2, slice(3, 11))).tobytes() == stacked["stack/w"][2, 3:11].tobytes()
    assert reader.read("params/w", (slice(None), slice(4, 9))).tobytes() == stacked["params/w"][:, 4:9].tobytes()


def test_large_arrays_of_a_trained_step_have_one_matrix_per_chunk(tmp_path, monkeypatch):
    import tensorstore as ts

    monkeypatch.setattr(arrays, "CHUNK_BYTES", 2**10)
    with Manager(tmp_path, config=config.CheckpointConfig()) as manager:
        manager.save(1, {"w": jax.numpy.zeros((3, 4, 16, 32))}, metadata={})
    kvstore = {"driver": "ocdbt", "base": f"file://{tmp_path}/step_00000001/arrays/", "path": "w/"}
    chunk = ts.open({"driver": "zarr3", "kvstore": kvstore}).result().chunk_layout.read_chunk.shape
    assert chunk[:2] == (1, 1)
    assert math.prod(chunk) * 4 <= 2**10


@pytest.mark.parametrize(
    "shape, dtype, chunk",
    [
        ((), np.int32, ()),
        ((7,), np.float32, (7,)),
        ((2, 256, 4096, 2048), np.float32, (1, 1, 4096, 2048)),
        ((129_280, 4096), np.float32, (2048, 4096)),
        ((4096, 129_280), np.float32, (4096, 2048)),
        ((3, 7168, 3072), np.float32, (1, 2730, 3072)),
        ((2**24,), np.float32, (2**23,)),
    ],
)
def test_chunks(shape, dtype, chunk):
    assert streaming.chunk_shape(shape, np.dtype(dtype)) == chunk


def test_memory_is_bounded_by_blocks(tmp_path, monkeypatch):
    """What Python allocates; TensorStore's own share is measured by `v4train bench convert`."""
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 2**18)
    monkeypatch.setattr(streaming, "_IN_FLIGHT_BYTES", 2**20)
    table = {"w": {"shape": [64, 256, 256], "dtype": "float32"}}
    tracemalloc.start()
    with streaming.new_step(tmp_path, step=0, table=table, values={}) as writer:
        for i in range(64):
            writer.write("w", (i,), np.full((256, 256), i, np.float32))
    reader = streaming.Reader(tmp_path / "step_00000000")
    for i in range(64):
        assert (reader.read("w", (i,)) == i).all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22  # of 16 MiB


def test_a_block_forgotten_or_of_another_type_is_noticed(tmp_path):
    table = {"w": {"shape": [2, 4, 4], "dtype": "float32"}}
    with (
        pytest.raises(AssertionError, match="not written completely"),
        streaming.new_step(tmp_path, step=0, table=table, values={}) as writer,
    ):
        writer.write("w", (0,), np.zeros((4, 4), np.float32))
    with (
        pytest.raises(AssertionError, match="w is float32, the block float64"),
        streaming.new_step(tmp_path, step=0, table=table, values={}) as writer,
    ):
        writer.write("w", (0,), np.zeros((4, 4)))
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_seen_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    table = {"w": {"shape": [2**30], "dtype": "float32"}}
    with pytest.raises(ValueError, match=r"need 4\.29 GB, 0\.00 GB are free"), streaming.new_step(tmp_path, step=0, table=table, values={}):
        pass


def test_locate(tmp_path):
    write(tmp_path / "checkpoints", {"w": np.zeros(3, np.float32)})
    inside = tmp_path / "checkpoints"
    assert step_directory.locate(tmp_path) == (inside, None)
    assert step_directory.locate(inside) == (inside, None)
    assert step_directory.locate(inside / "step_00000003") == (inside, 3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no finished checkpoint: give a run directory"):
        step_directory.locate(tmp_path / "empty")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        step_directory.locate(tmp_path / "nowhere")
