"""Declared once: what a module declares, stacks, tags, draws and binds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from v4train.core import axes, param

SEED = 7


class Linear(nnx.Module):
    """A matrix and a norm."""

    def __init__(self, width: int = 16):
        self.w = param.param((8, width), "D F", param.Normal(0.5), tags=frozenset({"first"}))
        self.norm = param.scale(8)

    def __call__(self, x):
        return (x * self.norm[...][None]) @ self.w[...]


class Net(nnx.Module):
    """Nested, with a buffer; ``extra`` adds a parameter that sorts before the others."""

    def __init__(self, *, extra: bool = False):
        self.layer = Linear()
        self.bias = param.buffer((3, 4), "M _", dtype=jnp.int32, tags=frozenset({"router_bias"}))
        if extra:
            self.a_first = param.param((4, 4), "D D", param.Normal(1.0))


def drawn(module: nnx.Module, **options) -> dict:
    return param.initialise(param.declarations(module), SEED, **options)


def test_a_module_is_abstract_until_it_is_bound():
    module = Net()
    leaves = jax.tree.leaves(nnx.state(module, nnx.Param))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    huge = param.param((10**6, 10**9), "E D", param.Normal(1.0))  # 4 PB if it were an array
    assert huge.get_metadata()["declaration"].size == 10**15


def test_declarations_have_the_structure_of_the_parameters():
    declared = param.flatten(param.declarations(Net()))
    assert list(declared) == ["bias", "layer/norm", "layer/w"]
    w, norm, bias = declared["layer/w"], declared["layer/norm"], declared["bias"]
    assert (w.shape, w.axes, w.group, w.decay, w.precision, w.tags) == ((8, 16), ("embed", "ffn"), "muon", True, "compute", {"first"})
    assert (norm.shape, norm.axes, norm.group, norm.decay, norm.precision) == ((8,), ("embed",), "adamw", True, "fp32")
    assert (bias.dtype, bias.group, bias.trained, bias.decay, bias.axes) == (jnp.int32, "buffer", False, False, ("modality", None))
    assert w.trained
    assert w.struct == jax.ShapeDtypeStruct((8, 16), jnp.float32)


def test_stacking_stacks_shape_axes_and_nothing_else():
    plain, stacked = param.declarations(Net()), param.declarations(param.stack(Net(), 5))
    before, after = param.flatten(plain), param.flatten(stacked)
    assert list(after) == list(before)  # the names of the parameters do not change
    for path, d in before.items():
        assert (after[path].shape, after[path].axes) == ((5, *d.shape), ("layers", *d.axes))
        kept = ("init", "group", "decay", "precision", "tags", "dtype")
        assert [getattr(after[path], name) for name in kept] == [getattr(d, name) for name in kept]


def test_stacked_variables_hold_stacked_structs():
    module = param.stack(Linear(), 3)
    assert module.w.get_value() == jax.ShapeDtypeStruct((3, 8, 16), jnp.float32)


def test_a_stack_of_stacks_counts_layers_from_outside_in():
    declared = param.declarations(param.stack(param.stack(Linear(), 3), 2))["w"]
    assert (declared.shape, declared.axes) == ((2, 3, 8, 16), ("layers", "layers", "embed", "ffn"))


def test_layers_of_a_stack_start_different():
    w = np.asarray(drawn(param.stack(Linear(), 3))["w"])
    assert w.shape == (3, 8, 16)
    assert not np.array_equal(w[0], w[1])
    assert np.corrcoef(w.reshape(3, -1))[0, 1] == pytest.approx(0, abs=0.3)


def test_tags_are_added_to_all_declarations_of_a_module():
    declared = param.flatten(param.declarations(param.tag(Net(), "mtp", "more")))
    assert declared["layer/w"].tags == {"first", "mtp", "more"}
    assert declared["bias"].tags == {"router_bias", "mtp", "more"}


def test_tagging_one_module_leaves_its_neighbour_alone():
    net = Net()
    net.layer = param.tag(net.layer, "indexer")
    declared = param.flatten(param.declarations(net))
    assert "indexer" in declared["layer/w"].tags
    assert "indexer" not in declared["bias"].tags


def test_initial_values_follow_the_declaration():
    class Wide(nnx.Module):
        def __init__(self):
            self.w = param.param((128, 512), "D F", param.Normal(0.02))
            self.half = param.param((128, 128), "D D", param.Constant(0.25), dtype=jnp.dtype(jnp.bfloat16))

    values = drawn(Wide())
    w = np.asarray(values["w"], np.float64)
    assert w.std() == pytest.approx(0.02, rel=0.02)
    assert abs(w.mean()) < 4 * 0.02 / w.size**0.5
    assert values["half"].dtype == jnp.bfloat16
    assert np.all(np.asarray(values["half"], np.float32) == 0.25)
    assert np.all(np.asarray(drawn(Net())["layer"]["norm"]) == 1)


def test_initial_values_do_not_depend_on_other_parameters():
    alone, beside = drawn(Net()), drawn(Net(extra=True))
    assert "a_first" in beside
    np.testing.assert_array_equal(alone["layer"]["w"], beside["layer"]["w"])
    assert not np.array_equal(np.asarray(beside["a_first"]).ravel()[:16], np.asarray(beside["layer"]["w"]).ravel()[:16])


@pytest.mark.parametrize("spec", [PartitionSpec("x"), PartitionSpec(None, "y"), PartitionSpec("y", "x"), PartitionSpec(("x", "y"))])
def test_initial_values_do_not_depend_on_the_mesh(spec):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = {"bias": whole, "layer": {"norm": whole, "w": NamedSharding(mesh, spec)}}
    sharded = drawn(Net(), shardings=shardings)
    assert sharded["layer"]["w"].sharding == NamedSharding(mesh, spec)
    jax.tree.map(np.testing.assert_array_equal, sharded, drawn(Net()))


def test_another_seed_draws_other_values():
    declared = param.declarations(Net())
    one, two = param.initialise(declared, SEED), param.initialise(declared, 8)
    assert not np.array_equal(one["layer"]["w"], two["layer"]["w"])


def test_bind_gives_the_module_its_arrays_and_leaves_the_original_abstract():
    module, x = Linear(), jnp.arange(8.0)[None] + 1
    params = {"w": jnp.full((8, 16), 2.0), "norm": jnp.arange(8.0)}
    bound = param.bind(module, params)
    expected = 2.0 * np.sum(np.arange(1, 9.0) * np.arange(8.0))
    np.testing.assert_allclose(bound(x), np.full((1, 16), expected))
    assert isinstance(module.w.get_value(), jax.ShapeDtypeStruct)
    assert param.declarations(bound) == param.declarations(module)


def test_bind_inside_a_trace_is_differentiable():
    module = Linear()
    params = {"w": jnp.ones((8, 16)), "norm": jnp.ones(8)}
    x = jnp.arange(8.0)[None]
    grads = jax.jit(jax.grad(lambda p: param.bind(module, p)(x).sum()))(params)
    np.testing.assert_allclose(grads["w"], np.repeat(np.arange(8.0)[:, None], 16, axis=1))
    np.testing.assert_allclose(grads["norm"], 16 * np.arange(8.0))


def test_bind_pairs_by_name_whatever_the_order_of_the_dict():
    w, norm = jnp.full((8, 16), 2.0), jnp.full((8,), 3.0)
    bound = param.bind(Linear(), {"w": w, "norm": norm})
    assert bound.w[...].shape == (8, 16)
    assert bound.norm[...].shape == (8,)


@pytest.mark.parametrize("params", [{"w": jnp.ones((8, 16))}, {"w": jnp.ones((8, 16)), "norm": jnp.ones(8), "x": jnp.ones(1)}])
def test_bind_refuses_too_few_or_too_many_arrays(params):
    with pytest.raises(ValueError, match="zip"):
        param.bind(Linear(), params)


def test_a_declaration_names_each_axis_and_muon_needs_a_matrix():
    with pytest.raises(AssertionError):
        param.param((2, 3), "D", param.Constant(0.0))
    with pytest.raises(AssertionError, match="muon needs a matrix"):
        param.param((2,), "D", param.Constant(0.0))


def test_logical_axes_come_from_the_one_table():
    assert axes.logical_axes("E D _") == ("experts", "embed", None)
    assert axes.logical_axes("") == ()
    assert len(set(axes.LETTERS.values())) == len(axes.LETTERS)
    with pytest.raises(KeyError):
        axes.logical_axes("B Q")


def test_map_and_flatten_use_the_same_paths():
    declared = param.declarations(Net())
    paths = param.map_declarations(lambda path, d: (path, d.size), declared)
    assert paths == {"bias": ("bias", 12), "layer": {"norm": ("layer/norm", 8), "w": ("layer/w", 128)}}


def test_fold_depends_on_seed_and_name_and_fits_a_key():
    seeds = {param.fold(seed, name) for seed in range(20) for name in ("a", "b", "a/b", "ab")}
    assert len(seeds) == 80
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert param.fold(0, "stack/run_0/layer_0/moe/router/gate") == 2080651632  # a change would change every initial value
