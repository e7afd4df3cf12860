"""What is kept for the backward pass: against functions whose derivative is written down by hand, and against the traced model itself."""

import jax
import jax.numpy as jnp
import pytest

from tests.plan import small
from v4train.model import config as model_config
from v4train.plan import activations

ROWS, WIDTH, OUT = 8, 16, 4
X = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16)
W = jax.ShapeDtypeStruct((WIDTH, OUT), jnp.bfloat16)


def residuals(function, *, fused: bool, own: int = 1) -> int:
    return activations.residual_bytes(lambda w, x: jax.vjp(function, w, x)[1], W, X, own=own, fused=fused)


def test_a_product_keeps_its_input():
    assert residuals(lambda w, x: x @ w, fused=False) == ROWS * WIDTH * 2
    assert residuals(lambda w, x: x @ w, fused=False, own=0) == WIDTH * OUT * 2


def test_an_activation_in_between_is_kept_unless_it_is_cheap_to_make_again():
    def squared(w, x):
        return jnp.square(x.astype(jnp.float32)).astype(jnp.bfloat16) @ w

    plain, fused = (residuals(squared, fused=fused) for fused in (False, True))
    assert plain >= ROWS * WIDTH * (2 + 4), "the square in bf16 for w, and an fp32 factor for x"
    assert fused == ROWS * WIDTH * 2, "all of it follows from x"


def test_the_result_of_a_product_is_not_made_again():
    def layer(w, x):
        return jnp.tanh((x @ w).astype(jnp.float32))

    assert residuals(layer, fused=True) == ROWS * WIDTH * 2 + ROWS * OUT * 2


def place(recipe, *, rows=2, tokens=256) -> activations.Place:
    return activations.Place(rows, tokens, recipe.numerics)


def test_full_remat_keeps_the_input_alone():
    recipe = small.recipe()
    kept = activations.of_layer(recipe.model, "csa", place=place(recipe))
    assert kept.saved == 2 * 256 * 2 * 128 * 4  # rows x tokens x streams x width x fp32
    assert kept.inside > 5 * kept.saved


@pytest.mark.parametrize("kind", ["csa", "hca"])
def test_less_remat_keeps_more(kind):
    saved = []
    for remat in ("full", "dots", "none"):
        recipe = small.recipe()
        model = recipe.model.model_copy(update={"remat": remat})
        saved.append(activations.of_layer(model, kind, place=place(recipe)).saved)
    assert saved[0] < saved[1] < saved[2], saved


def test_what_is_kept_grows_with_tokens_not_with_their_square():
    recipe = small.recipe()
    short, long = (activations.of_layer(recipe.model, "hca", place=place(recipe, tokens=tokens)).inside for tokens in (256, 1024))
    assert long == pytest.approx(4 * short, rel=0.02)


def test_half_the_width_of_numbers_keeps_about_half():
    wide, narrow = small.recipe(), small.recipe(numerics={"compute": "bfloat16"})
    one, other = (activations.of_layer(r.model, "csa", place=place(r)).inside for r in (wide, narrow))
    assert 0.45 < other / one < 0.7


def test_a_plain_residual_keeps_one_stream_and_nothing_for_the_head():
    recipe = small.recipe()
    model = recipe.model.model_copy(update={"hyper": model_config.ResidualConfig(), "remat": "full"})
    assert activations.of_layer(model, "csa", place=place(recipe)).saved == 2 * 256 * 128 * 4
    plain, mixed = (activations.of_collapse(one, place=place(recipe)) for one in (model, recipe.model))
    assert plain <= 2 * 256 * 128 * 4 < mixed
