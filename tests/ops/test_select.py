"""The table names only implementations that exist, and says what there is when asked for something else."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4train.ops import grouped_matmul, products, select, top_k
from v4train.ops.exchange import route

IMPLEMENTATIONS = {
    "grouped_matmul": get_args(grouped_matmul.Implementation),
    "linear_product": ("compute",),
    "experts_product": ("compute",),
    "fp8_linear": ("emulated", *get_args(products.Kernel)),
    "fp8_experts": ("emulated", *get_args(products.Kernel)),
    "expert_exchange": get_args(route.Transport),
    "ragged_all_to_all": ("emulated", "ragged"),
    "sparse_attention": ("chunked",),
    "summed_rows": ("compared", "scattered"),
    "top_k": get_args(top_k.Named),
}


@pytest.mark.parametrize(("op", "platform"), [(op, platform) for op, row in select.TABLE.items() for platform in row])
def test_every_entry_exists(op, platform):
    assert select.implementation(op, platform=platform) in IMPLEMENTATIONS[op]


def test_the_platform_is_the_one_jax_runs_on():
    for op in select.TABLE:
        assert select.implementation(op) == select.implementation(op, platform=jax.default_backend())


def test_grouped_matmul_of_this_platform_agrees_with_the_oracle():
    x, w, sizes = jnp.arange(24.0).reshape(8, 3), jnp.arange(24.0).reshape(2, 3, 4), jnp.array([3, 4])
    chosen = select.implementation("grouped_matmul")
    got, expected = (grouped_matmul.grouped_matmul(x, w, sizes, implementation=i) for i in (chosen, "dense"))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_unknown_names_are_refused_with_the_options():
    with pytest.raises(ValueError, match=r"unknown op 'matmul'; choose one of expert_exchange, experts_product, fp8_experts"):
        select.implementation("matmul")
    with pytest.raises(ValueError, match=r"grouped_matmul has no implementation for platform 'abacus'; there is one for cpu, gpu, tpu"):
        select.implementation("grouped_matmul", platform="abacus")


def test_using_changes_one_op_of_what_is_traced_inside_and_nothing_else():
    def latest(scores, *, k):
        return scores.shape[-1] - 1 - jnp.broadcast_to(jnp.arange(k), (*scores.shape[:-1], k))

    before = {op: select.implementation(op) for op in select.TABLE}
    with select.using("top_k", implementation=latest):
        found = {op: select.implementation(op) for op in select.TABLE}
        assert select.implementation("top_k", platform="cpu") == "earliest"
        picked = jax.jit(lambda x: top_k.top_k(x, k=2, implementation=select.implementation("top_k")))(jnp.zeros((1, 4)))
    assert found == before | {"top_k": latest}
    assert picked.tolist() == [[3, 2]]
    assert {op: select.implementation(op) for op in select.TABLE} == before
    with pytest.raises(ValueError, match="unknown op 'sort'; choose one of"), select.using("sort", implementation=latest):
        pass


def test_compiling_for_another_platform_takes_its_column():
    with select.compiling_for("tpu"):
        assert select.implementation("grouped_matmul") == select.TABLE["grouped_matmul"]["tpu"] != select.TABLE["grouped_matmul"]["cpu"]
        assert select.implementation("grouped_matmul", platform="cpu") == select.TABLE["grouped_matmul"]["cpu"]
    assert select.implementation("grouped_matmul") == select.implementation("grouped_matmul", platform=jax.default_backend())
