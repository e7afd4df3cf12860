"""How much of each parameter a device holds and uses: against the shardings that the trainer gives its arrays, and against hand counts."""

import math

import jax
import pytest

from tests.plan import small
from v4train.core import param
from v4train.model import transformer
from v4train.plan import activations, memory, weights
from v4train.sharding import mesh as mesh_lib
from v4train.train import build


def placed(recipe) -> dict[str, weights.Weight]:
    declared = param.declarations(transformer.Transformer(recipe.model))
    return {w.path: w for w in weights.on_mesh(declared, mesh=mesh_lib.abstract(recipe.mesh))}


NOTHING = {kind: activations.Kept(0, 0) for kind in ("csa", "hca", "window")}
MESHES = [
    {"fsdp": 8},
    {"fsdp": 1, "expert": 8},
    {"fsdp": 1, "context": 8},
    {"fsdp": 1, "tensor": 8},
    {"fsdp": 1, "replica": 8},
    {"fsdp": 2, "expert": 4},
    {"fsdp": 2, "expert": 2, "context": 2},
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_stored_is_what_the_trainer_places_on_a_device(mesh):
    recipe = small.recipe(mesh=mesh)
    abstract = build.abstract(recipe, mesh=mesh_lib.abstract(recipe.mesh))
    ours = placed(recipe)
    leaves = [
        *jax.tree_util.tree_flatten_with_path(abstract.state.params)[0],
        *jax.tree_util.tree_flatten_with_path(abstract.state.buffers)[0],
    ]
    assert len(leaves) == len(ours)
    for path, leaf in leaves:
        assert ours[param.path_name(path)].stored == math.prod(leaf.sharding.shard_shape(leaf.shape)), param.path_name(path)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_state_is_what_a_compiled_step_would_be_given(mesh):
    recipe = small.recipe(mesh=mesh)
    abstract = build.abstract(recipe, mesh=mesh_lib.abstract(recipe.mesh))
    shape = next(iter(abstract.batches))
    given = 0
    for leaf in jax.tree.leaves((abstract.state, abstract.batches[shape])):
        given += leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
    found = memory.of_step(recipe, list(placed(recipe).values()), shape=shape, platform="cpu", per_layer=NOTHING)
    assert found.state == pytest.approx(given, rel=2e-3)


def test_used_and_gathered():
    split = placed(small.recipe(mesh={"fsdp": 2, "expert": 4}))
    expert = split["stack/run_0/layer_0/moe/experts/w1"]
    layers, experts, hidden, ffn = 2, 8, 128, 64
    assert expert.used == layers * experts // 4 * hidden * ffn
    assert expert.stored == expert.used // 2
    assert (expert.gathered_over, expert.copied_over, expert.rows, expert.columns) == (("fsdp",), (), (), ())
    query = split["stack/run_0/layer_0/attention/projections/wq_b"]
    assert query.used == query.declaration.size == 8 * query.stored
    assert set(query.gathered_over) == {"fsdp", "expert"}
    assert query.rows or query.columns, "a dense matrix is stored in parts"
    norm = split["norm"]
    assert (norm.stored, norm.used, norm.gathered_over) == (128, 128, ())


def test_rows_are_those_of_the_shorter_side():
    split = placed(small.recipe(mesh={"fsdp": 8}))
    tall, wide = split["stack/run_0/layer_0/moe/shared/w1"], split["stack/run_0/layer_0/moe/shared/w2"]
    assert tall.declaration.shape[-2:] == (128, 64)
    assert wide.declaration.shape[-2:] == (64, 128)
    for w in (tall, wide):
        assert not (w.rows and w.columns)
        assert (w.rows or w.columns) in ((), ("fsdp",))


def test_all_stacks_of_a_shape_are_in_memory_of_the_iteration_together():
    """What `optim.stacking` joins: stored in different ways, of one shape, one call. Counted by hand for 2 x 4 devices."""
    recipe = small.recipe(mesh={"fsdp": 2, "expert": 4})
    found = weights.stacks(placed(recipe).values(), sizes=recipe.mesh.sizes)
    by_shape: dict[tuple[int, int], list[int]] = {}
    for stack in found:
        assert stack.joined
        by_shape.setdefault(stack.shape, []).append(stack.dealt)
    most = weights.most_at_once(placed(recipe).values(), sizes=recipe.mesh.sizes)
    assert max(len(parts) for parts in by_shape.values()) > 1, "else nothing is joined here"
    assert most == max(sum(parts) for parts in by_shape.values())
    experts = 4 * 3 * 8 // 8 * 64 * 128  # layers x matrices x experts, an eighth of them
    assert most >= experts
