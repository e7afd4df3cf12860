"""The released shapes: exact parameter counts, layer layouts, recipes that resolve, and a program whose size does not grow with depth."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from v4train import recipe
from v4train.core import param
from v4train.model import config as config_lib
from v4train.model import context, count, stack, transformer

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
RELEASED = ("v4_flash", "v4_pro", "v4_1t")


def model_of(name: str) -> config_lib.ModelConfig:
    return recipe.resolve(str(CONFIGS / f"{name}.yaml")).config.model


def counted(config: config_lib.ModelConfig) -> count.ParameterCount:
    return count.parameters(param.declarations(transformer.Transformer(config)), top_k=config.moe.top_k)


def stages() -> list[tuple[str, tuple[str, ...]]]:
    """The overrides that the recipes' headings show."""
    found = []
    for path in sorted(CONFIGS.glob("*.yaml")):
        for line in path.read_text(encoding="utf-8").replace("\\\n#", " ").splitlines():
            if line.startswith("#") and "--set" in line:
                found.append((path.name, tuple(re.findall(r"--set (\S+)", line))))
    return found


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_resolves(path):
    assert recipe.resolve(str(path)).config.name == path.stem


def test_the_stages_that_the_headings_show_resolve():
    assert len(stages()) >= 7
    for name, overrides in stages():
        resolved = recipe.resolve(str(CONFIGS / name), overrides=overrides).config
        assert resolved.tokens_per_step >= 75e6, (name, overrides)


def test_a_recipe_that_does_not_fit_together_says_how_to_mend_it():
    with pytest.raises(ValueError, match=r"train.batch_rows 1000 must be a multiple of 4608 .*; nearest: 4608"):
        recipe.resolve(str(CONFIGS / "v4_flash.yaml"), overrides=("train.batch_rows=1000",))


@pytest.mark.parametrize(
    ("name", "total", "active", "mtp", "mtp_active"),
    [
        ("v4_flash", 284_332_230_231, 13_270_091_351, 6_610_048_635, 318_592_635),  # published: 284.33B, 13.27B
        ("v4_pro", 1_572_997_179_491, 48_852_379_747, 25_840_145_595, 869_356_731),  # published: 1573.0B, 48.85B
        ("v4_1t", 997_431_773_463, 31_940_435_223, 16_926_070_427, 576_149_147),
    ],
)
def test_counts_are_the_published_ones(name, total, active, mtp, mtp_active):
    counts = counted(model_of(name))
    assert (counts.total, counts.active, counts.mtp, counts.mtp_active) == (total, active, mtp, mtp_active)
    assert sum(counts.by_kind.values()) == total


def test_the_one_trillion_model_is_one():
    counts = counted(model_of("v4_1t"))
    assert counts.total == pytest.approx(1.0e12, rel=0.005)
    assert counts.active == pytest.approx(32e9, rel=0.005)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("v4_flash", {"attention": 4.60, "experts": 278.15, "indexer": 0.226, "compressor": 0.261, "hyper_connection": 0.034}),
        ("v4_pro", {"attention": 18.29, "experts": 1551.6, "indexer": 0.501, "compressor": 0.670, "hyper_connection": 0.084}),
    ],
)
def test_counts_by_kind(name, billions):
    kinds = counted(model_of(name)).by_kind
    kinds["experts"] = kinds["routed_expert"] + kinds["shared_expert"] + kinds["router"]
    assert {kind: kinds[kind] / 1e9 for kind in billions} == pytest.approx(billions, rel=5e-3)


def test_kinds_of_the_expert_layers_in_closed_form():
    config = model_of("v4_flash")
    layers, hidden = 43, 4096
    kinds = counted(config).by_kind
    assert kinds["routed_expert"] == layers * 256 * 3 * hidden * 2048
    assert kinds["shared_expert"] == layers * 3 * hidden * 2048
    assert kinds["router"] == layers * hidden * 256  # neither the bias nor the hash tables
    assert kinds["embedding"] == kinds["head"] == 129_280 * hidden
    assert "stem" not in kinds


def test_a_parameter_of_no_kind_is_noticed():
    with pytest.raises(AssertionError, match="stack/run_0/layer_0/surprise is of no kind"):
        count.kind_of("stack/run_0/layer_0/surprise")


def test_stems_are_counted_but_not_active():
    config = model_of("v4_1t")
    d, patch_values = config.hidden, 3 * 32 * 32
    stems = (patch_values * 2 * d + 2 * d * d + 2 * 1120 * d + d) + (80 * 16 * d + d)
    with_stems, without = counted(config), counted(config.model_copy(update={"image": None, "audio": None}))
    assert with_stems.by_kind["stem"] == stems == with_stems.total - without.total
    assert with_stems.active == without.active


def test_layouts_give_the_released_ratios():
    assert model_of("v4_flash").compress_ratios == (0, 0, *(4, 128) * 20, 4, 0)
    assert model_of("v4_pro").compress_ratios == (128, 128, *(4, 128) * 29, 4, 0)
    assert model_of("v4_1t").compress_ratios == (128, 128, *(4, 128) * 28, 4, 0)


@pytest.mark.parametrize(("name", "window", "csa", "hca"), [("v4_flash", 2, 21, 20), ("v4_pro", 0, 30, 31)])
def test_layer_census_and_other_released_values(name, window, csa, hca):
    config = model_of(name)
    assert [config.layer_kinds.count(kind) for kind in ("window", "csa", "hca")] == [window, csa, hca]
    assert config.moe.hash_layers == 3
    assert config.moe.scaling == {"v4_flash": 1.5, "v4_pro": 2.5}[name]
    assert config.max_positions == 1_048_576
    assert config.attention.yarn == config_lib.YarnConfig(factor=16, original_positions=65_536, beta_fast=32, beta_slow=1)


@pytest.mark.parametrize("name", RELEASED)
def test_few_bodies_are_compiled(name):
    config = model_of(name)
    runs = stack.factor(stack.layer_specs(config))
    assert sum(len(run.pattern) for run in runs) <= 4
    assert [spec for run in runs for _ in range(run.repeat) for spec in run.pattern] == list(stack.layer_specs(config))


def test_counting_needs_no_device():
    program = """
from v4train import recipe
from v4train.core import param
from v4train.model import count, transformer
import sys
model = recipe.resolve(sys.argv[1]).config.model
print(count.parameters(param.declarations(transformer.Transformer(model)), top_k=model.moe.top_k).total)
"""
    run = subprocess.run(
        [sys.executable, "-c", program, str(CONFIGS / "v4_pro.yaml")],
        env={**os.environ, "JAX_PLATFORMS": "no_such_platform"},  # whatever touches a device fails
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "1572997179491", run.stderr


def narrow(config: config_lib.ModelConfig, layers: list | None = None) -> config_lib.ModelConfig:
    """The same layers in a tiny width."""
    small = config.model_dump(mode="json")
    small |= {"vocab_size": 32, "hidden": 16, "loss_chunk": 32}
    small["attention"] |= {"heads": 2, "head_dim": 8, "rope_dim": 4, "query_rank": 8, "output_groups": 2, "output_rank": 4, "window": 16}
    small["attention"]["chunk"] = 16
    small["moe"] |= {"experts": 4, "top_k": 2, "ffn": 8}
    small["kinds"] = [
        kind | ({"index_heads": 2, "index_head_dim": 4, "top_k": 4, "phase": "sparse"} if kind["kind"] == "csa" else {})
        for kind in small["kinds"]
    ]
    if layers is not None:
        small["layers"] = layers
    return config_lib.ModelConfig.model_validate(small)


def equations(jaxpr) -> int:
    """Equations of a jaxpr and of all jaxprs inside."""
    parts = [part for equation in jaxpr.eqns for part in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns"))]
    return len(jaxpr.eqns) + sum(equations(getattr(part, "jaxpr", part)) for part in parts if hasattr(part, "eqns"))


def traced_size(config: config_lib.ModelConfig) -> int:
    """Equations of the forward pass with the loss, traced without any array."""
    model = transformer.Transformer(config)
    row = jax.ShapeDtypeStruct((1, 256), jnp.int32)

    def loss(params, tokens, segment_ids, positions, modality):
        bound = param.bind(model, params)
        out = bound(context.Inputs(tokens, segment_ids, positions, modality))
        return bound.token_losses(out.hidden, tokens).sum()

    params = param.map_declarations(lambda _, declaration: declaration.struct, param.declarations(model))
    return equations(jax.make_jaxpr(loss)(params, row, row, row, row).jaxpr)


@pytest.mark.parametrize(("name", "first"), [("v4_flash", "window"), ("v4_pro", "hca")])
def test_the_program_does_not_grow_with_depth(name, first):
    config = narrow(model_of(name))
    ends = [{"pattern": [first], "repeat": 2}, {"pattern": ["csa"]}]
    six = narrow(config, [ends[0], {"pattern": ["csa", "hca"], "repeat": 2}])
    seven = narrow(config, [ends[0], {"pattern": ["csa", "hca"], "repeat": 2}, ends[1]])
    one_body = narrow(config, [{"pattern": [first], "repeat": 3}])
    size = traced_size(config)
    assert config.depth in (43, 61)
    assert (six.depth, seven.depth) == (6, 7)
    assert size <= 1.1 * traced_size(six)
    assert size == traced_size(seven)  # the same bodies, scanned more often
    assert size > 1.5 * traced_size(one_body)  # the count does see bodies
