"""Routing through experts on meshes of eight emulated devices, against experts that see every token and a one-hot combination."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from v4train.ops import expert_exchange, grouped_matmul

TOKENS, CHOICES, EXPERTS, WIDTH, HIDDEN = 64, 3, 16, 12, 8
ROUTINGS = ["balanced", "skewed", "empty_experts", "nowhere", "all_nowhere"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(grouped_matmul, "BLOCK_ROWS", 8)


def _ids(routing):
    rng = np.random.default_rng(1)
    slots = (TOKENS, CHOICES)
    match routing:
        case "balanced":
            ids = rng.permutation(TOKENS * CHOICES).reshape(slots) % EXPERTS
        case "skewed":
            ids = np.full(slots, 5)
        case "empty_experts":
            ids = rng.choice([0, 6, 7, 15], slots)
        case "nowhere":
            ids = rng.integers(0, EXPERTS, slots)
            ids[rng.uniform(size=slots) < 0.2] = EXPERTS
            ids[40:] = EXPERTS
        case "all_nowhere":
            ids = np.full(slots, EXPERTS)
    return ids.astype(np.int32)


def _arrays(ids, dtype=jnp.float32):
    """x, weights, up, down; tokens that go nowhere are NaN: nobody may look at them."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(TOKENS, WIDTH))
    x[(ids == EXPERTS).all(1)] = np.nan
    up = rng.normal(size=(EXPERTS, WIDTH, HIDDEN)) / WIDTH**0.5
    down = rng.normal(size=(EXPERTS, HIDDEN, WIDTH)) / HIDDEN**0.5
    return jnp.asarray(x, dtype), jnp.asarray(rng.uniform(size=ids.shape), jnp.float32), jnp.asarray(up, dtype), jnp.asarray(down, dtype)


def _dense(x, weights, up, down, ids):
    x = jnp.nan_to_num(x)
    every = jnp.einsum("etf,efd->ted", jax.nn.silu(jnp.einsum("td,edf->etf", x, up)), down)
    factor = jnp.einsum("tk,tke->te", weights, jax.nn.one_hot(ids, EXPERTS, dtype=jnp.float32))
    return jnp.einsum("te,ted->td", factor, every)


def _mesh(experts):
    return jax.make_mesh((8 // experts, experts), ("fsdp", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def _routed(experts, *, transport="emulated", check_vma=True):
    """The layer on a mesh of ``8 / experts`` x ``experts`` devices, or on one device without a mesh for None."""

    def layer(x, weights, up, down, ids):
        def expert_fn(rows, group_sizes):
            product = functools.partial(grouped_matmul.grouped_matmul, group_sizes=group_sizes, implementation="blocked")
            return product(jax.nn.silu(product(rows, up)), down)

        axis_name = None if experts is None else "expert"
        return expert_exchange.route_through_experts(
            x, ids, weights, expert_fn, num_experts=EXPERTS, axis_name=axis_name, transport=transport
        )

    if experts is None:
        return layer
    tokens, of_experts = P(("fsdp", "expert")), P("expert")
    in_specs = (tokens, tokens, of_experts, of_experts, tokens)
    return jax.shard_map(layer, mesh=_mesh(experts), in_specs=in_specs, out_specs=tokens, check_vma=check_vma)


def _output_and_gradients(layer):
    def run(x, weights, up, down, ids):
        y, pull = jax.vjp(lambda *a: layer(*a, ids), x, weights, up, down)
        return y, *pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype))

    return jax.jit(run)


_compiled = functools.cache(lambda experts: _output_and_gradients(_routed(experts)))
_oracle = _output_and_gradients(_dense)


def _assert_equal(got, expected, *, rtol=1e-4, atol=1e-5):
    for name, a, b in zip(("y", "dx", "dweights", "dup", "ddown"), got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("experts", [None, 1, 2, 4, 8])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_agrees_with_dense_experts(routing, experts):
    ids = _ids(routing)
    arrays = _arrays(ids)
    _assert_equal(_compiled(experts)(*arrays, ids), _oracle(*arrays, ids))


def _ragged_all_to_all_by_its_documentation(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What the documentation of `jax.lax.ragged_all_to_all` says, slice by slice, for the CPU."""
    me, devices = lax.axis_index(axis_name), lax.axis_size(axis_name)
    slices = len(input_offsets) // devices
    operands, starts, sizes, targets = (lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets))
    row = jnp.arange(len(output))
    for source in range(devices):
        for i in range(slices):
            s = me * slices + i
            offset, size = targets[source, s], jnp.minimum(sizes[source, s], recv_sizes[source * slices + i])
            moved = operands[source][jnp.clip(row - offset + starts[source, s], 0, len(operand) - 1)]
            output = jnp.where(((row >= offset) & (row < offset + size))[:, None], moved, output)
    return output


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_ragged_transport_is_called_as_documented(routing, monkeypatch):
    monkeypatch.setattr(lax, "ragged_all_to_all", _ragged_all_to_all_by_its_documentation)
    ids = _ids(routing)
    arrays = _arrays(ids)
    _assert_equal(_output_and_gradients(_routed(4, transport="ragged"))(*arrays, ids), _oracle(*arrays, ids))


@pytest.mark.parametrize("check_vma", [True, False])
def test_on_tpu_the_ragged_exchange_is_all_there_is(check_vma):
    """Two exchanges forward, two backward, and no scatter in either direction."""
    ids = _ids("balanced")
    run = _output_and_gradients(_routed(4, transport="ragged", check_vma=check_vma))
    program = run.trace(*_arrays(ids), ids).lower(lowering_platforms=("tpu",)).as_text()
    assert program.count("@ragged_all_to_all") == 4
    assert "all_to_all" not in program.replace("@ragged_all_to_all", "").replace("ragged_all_to_all_", "")
    assert "stablehlo.scatter" not in program


def test_no_scatter_in_the_emulation():
    ids = _ids("balanced")
    assert "stablehlo.scatter" not in _compiled(4).lower(*_arrays(ids), ids).as_text()


def test_bf16_tokens_and_experts():
    ids = _ids("nowhere")
    got = _compiled(4)(*_arrays(ids, jnp.bfloat16), ids)
    assert [a.dtype for a in got] == [jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.bfloat16]
    rounded = [a.astype(jnp.float32) for a in _arrays(ids, jnp.bfloat16)]
    _assert_equal(got, _oracle(*rounded, ids), rtol=0.05, atol=0.05)


def test_two_runs_agree_bit_for_bit():
    ids = _ids("skewed")
    first, second = (_compiled(4)(*_arrays(ids), ids) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_result_does_not_depend_on_how_the_experts_are_split():
    ids = _ids("nowhere")
    outputs = [np.asarray(_compiled(experts)(*_arrays(ids), ids)[0]) for experts in (None, 2, 8)]
    for y in outputs[1:]:
        np.testing.assert_allclose(y, outputs[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_scan_and_remat(check_vma):
    ids = _ids("balanced")
    x, weights, up, down = _arrays(ids)
    layers = jnp.stack([up, up[::-1], -up]), jnp.stack([down, down[::-1], down])

    def residual(layer, x, weights, ups, downs):
        @jax.checkpoint
        def body(x, matrices):
            return x + layer(x, weights, *matrices, ids), None

        return lax.scan(body, x, (ups, downs))[0]

    mesh = _mesh(4)
    with jax.set_mesh(mesh):
        split = [jax.device_put(a, jax.NamedSharding(mesh, P(*spec))) for a, spec in ((x, (("fsdp", "expert"),)), (weights, (None,)))]
        got = _gradients_of(functools.partial(residual, _routed(4, check_vma=check_vma)))(*split, *layers)
    expected = _gradients_of(functools.partial(residual, _dense))(x, weights, *layers)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def _gradients_of(model):
    return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(model(*a))), argnums=(0, 1, 2, 3)))


@pytest.mark.parametrize("experts", [None, 4])
def test_what_the_experts_return_past_the_end_is_not_used(experts):
    def layer(x, weights, ids):
        def expert_fn(rows, group_sizes):
            return jnp.where(jnp.arange(len(rows))[:, None] < group_sizes.sum(), rows, jnp.nan)

        axis_name = None if experts is None else "expert"
        return expert_exchange.route_through_experts(
            x, ids, weights, expert_fn, num_experts=EXPERTS, axis_name=axis_name, transport="emulated"
        )

    tokens = P(("fsdp", "expert"))
    run = layer if experts is None else jax.shard_map(layer, mesh=_mesh(experts), in_specs=(tokens,) * 3, out_specs=tokens)
    ids = _ids("nowhere")
    x, weights, *_ = _arrays(ids)
    y, pull = jax.vjp(jax.jit(lambda weights: run(x, weights, ids)), weights)
    placed = ids < EXPERTS
    x = np.nan_to_num(x)
    np.testing.assert_allclose(y, x * (weights * placed).sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(pull(jnp.ones_like(y))[0], x.sum(1, keepdims=True) * placed, rtol=1e-5, atol=1e-5)


def test_experts_must_divide():
    call = functools.partial(expert_exchange.route_through_experts, transport="emulated")

    def layer(x):
        ids = jnp.zeros((len(x), 1), jnp.int32)
        return call(x, ids, ids.astype(jnp.float32), lambda rows, sizes: rows, num_experts=6, axis_name="expert")

    run = jax.shard_map(layer, mesh=_mesh(4), in_specs=P("expert"), out_specs=P("expert"))
    with pytest.raises(ValueError, match=r"6 experts cannot be split evenly over mesh axis 'expert' of size 4"):
        run(jnp.ones((8, 2)))


def test_unknown_transport_names_the_options():
    ids = jnp.zeros((2, 1), jnp.int32)
    with pytest.raises(ValueError, match=r"unknown transport 'pigeon'; choose one of ragged, emulated"):
        expert_exchange.route_through_experts(
            jnp.ones((2, 3)), ids, jnp.ones((2, 1)), lambda rows, sizes: rows, num_experts=1, axis_name=None, transport="pigeon"
        )
