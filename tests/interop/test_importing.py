"""An import is a step like those that training writes: same names, shapes and types, readable onto any mesh."""

import pathlib
import types

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from tests.interop import steps
from v4train.checkpoint import arrays, restore
from v4train.core import param
from v4train.interop import importing, matching, tensor_files
from v4train.interop import released as released_lib
from v4train.model import transformer
from v4train.sharding import config as sharding_config
from v4train.sharding import mesh as mesh_lib
from v4train.sharding import rules
from v4train.train import build
from v4train.train import state as state_lib

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("text_only", [False, True])
def test_the_arrays_are_those_of_a_training_state(text_only):
    made = steps.recipe("configs/tiny.yaml")
    model = made.model.model_copy(update={"image": None, "audio": None}) if text_only else made.model
    declared = param.declarations(transformer.Transformer(model))
    recipe = made.model_copy(update={"model": model})
    optimizer = build.optimizer_of(recipe, declared, mesh=mesh_lib.make(sharding_config.MeshConfig()))
    state = arrays.describe(arrays.flatten(state_lib.declared(declared, optimizer=optimizer)))
    assert importing.state_table(model) == {name: row for name, row in state.items() if not name.startswith("optimizer/")}


@pytest.mark.parametrize("mesh", [{}, {"expert": 2, "fsdp": 4}], ids=["one device", "eight"])
@pytest.mark.parametrize("case", ["mixed", "untied"])
def test_a_golden_case_is_restored_with_the_values_of_its_file(case, mesh, tmp_path):
    """Expected values are taken from the file by the safetensors library and by rules written out here, not by `names`."""
    released = released_lib.Released.open(GOLDEN / case)
    importing.write_step(released, tmp_path, values={"seed": 3})
    devices = mesh_lib.make(sharding_config.MeshConfig(**mesh))
    declared = param.declarations(transformer.Transformer(released.model))

    def struct(path: str, d: param.Declaration) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(d.shape, d.dtype, sharding=rules.parameter_sharding(d.axes, shape=d.shape, mesh=devices))

    template = {}
    for path, d in param.flatten(declared).items():
        *parents, leaf = importing.stored_name(path, d).split("/")
        inner = template
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[leaf] = struct(path, d)
    read = restore.restore(tmp_path, template=template["params"], subtree="params").state
    buffers = restore.restore(tmp_path, template=template["buffers"], subtree="buffers").state
    flat = {path: np.asarray(x) for tree in (read, buffers) for path, x in arrays.flatten(tree).items()}

    theirs = {name.removeprefix("model."): x for name, x in safetensors_numpy.load_file(GOLDEN / case / "model.safetensors").items()}
    places = [(path, layer) for path in flat if path.endswith("moe/router/gate") for layer in range(len(flat[path]))]
    gates = [theirs[f"layers.{i}.ffn.gate.weight"].T for i in range(released.model.depth)]
    found = [flat[path][layer] for path, layer in places]
    assert sorted(x.tobytes() for x in found) == sorted(np.ascontiguousarray(x).tobytes() for x in gates)
    assert np.array_equal(flat["embedding/table"], theirs["embed.weight"])
    assert np.array_equal(flat["head"], theirs["head.weight"].T)
    experts = {np.ascontiguousarray(x.T).tobytes() for name, x in theirs.items() if ".experts." in name}
    ours = {x.tobytes() for path, x in flat.items() if "/experts/" in path for x in x.reshape(-1, *x.shape[-2:])}
    assert ours == experts
    assert restore.describe(tmp_path).metadata == {"seed": 3}


def test_a_source_that_changes_while_it_is_read_leaves_nothing(tmp_path, monkeypatch):
    released = released_lib.Released.open(GOLDEN / "mixed")

    def fail(*_, **__):
        raise ValueError("model.safetensors became shorter while it was read")

    monkeypatch.setattr(tensor_files.TensorFiles, "read", fail)
    with pytest.raises(ValueError, match="became shorter"):
        importing.write_step(released, tmp_path, values={})
    assert list(tmp_path.iterdir()) == []


def test_only_plain_large_matrices_are_cut(monkeypatch):
    """A quantised matrix, a part of fused experts, and stems are read whole."""
    monkeypatch.setattr(importing, "PIECE_BYTES", 1_000)
    released = released_lib.Released.open(GOLDEN / "mixed")
    slot = next(slot for slot in released.slots if slot.kind == "embedding")
    plain = released.sources[slot.released]
    assert importing._is_cut(slot, plain)
    assert not importing._is_cut(slot, matching.Source("x", "fp8", "x.scale"))
    grouped = next(slot for slot in released.slots if slot.turn == "grouped")
    assert not importing._is_cut(grouped, released.sources[grouped.released])


@pytest.mark.parametrize("kind", ["embedding", "head"])
def test_a_matrix_is_cut_at_chunks(kind, monkeypatch):
    """A piece that began inside a chunk would be written by reading the chunk back, with both in memory."""
    released = released_lib.Released.open(GOLDEN / "mixed")
    slot = next(slot for slot in released.slots if slot.kind == kind)
    monkeypatch.setattr(importing, "PIECE_BYTES", 40 * 4 * slot.shape[1])
    rows, width = slot.shape
    chunk, axis = 16, int(kind == "head")
    writer = types.SimpleNamespace(chunks={"stored": (width, chunk) if axis else (chunk, width)})
    only = types.SimpleNamespace(slots=(slot,), sources=released.sources, files=released.files)
    pieces = [piece() for piece in importing._pieces(only, writer, {slot.path: "stored"})]
    parts = [index[axis] for _, index, _ in pieces]
    assert [part.start for part in parts] == list(range(0, rows, 32))
    assert parts[-1].stop == rows
    assert np.array_equal(np.concatenate([block for *_, block in pieces], axis=axis), released.block(slot))
