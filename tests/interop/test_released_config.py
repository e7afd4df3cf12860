"""config.json against the recipes of the released models, the published counts, and the config class of `transformers`."""

import copy
import json
import pathlib

import pytest

from tests.model import golden, small
from v4train import recipe
from v4train.core import param
from v4train.interop import released_config
from v4train.model import config as config_lib
from v4train.model import count, transformer

ROOT = pathlib.Path(__file__).parents[2]
RELEASED = {path.stem: json.loads(path.read_text()) for path in sorted((pathlib.Path(__file__).parent / "released").glob("*.json"))}


def plain(value):
    """A config as plain values; a list is a mapping from places, so that a path leads to every leaf."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    return {str(i): plain(inner) for i, inner in enumerate(value)} if isinstance(value, list | tuple) else value


def leaves(value, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    if not isinstance(value, dict):
        return {path: value}
    return {inner: leaf for key, part in value.items() for inner, leaf in leaves(part, (*path, key)).items()}


def is_said(path: tuple[str, ...]) -> bool:
    """Whether config.json has a word for the field at this path."""
    patterns = [pattern.split(".") for pattern in released_config.UNSAID]
    return not any(len(p) == len(path) and all(a in ("*", b) for a, b in zip(p, path, strict=True)) for p in patterns)


def said(model: config_lib.ModelConfig) -> dict:
    return {path: leaf for path, leaf in leaves(plain(model.model_dump())).items() if is_said(path)}


def problems(config: dict) -> str:
    with pytest.raises(ValueError, match=r"config.json cannot be used") as caught:
        released_config.model_config(config)
    return str(caught.value)


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_values_are_the_recipe(name):
    model = released_config.model_config(RELEASED[name])
    expected = recipe.resolve(str(ROOT / "configs" / f"{name}.yaml")).config.model
    assert said(model) == said(expected)
    assert model.layers == expected.layers
    assert {path for path, leaf in leaves(plain(model.model_dump())).items() if leaves(plain(expected.model_dump()))[path] != leaf} == {
        ("kinds", str([kind.kind for kind in expected.kinds].index("csa")), "phase"),  # the recipes begin with the dense stage
        ("loss_chunk",),
    }


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("v4_flash", 284.33e9, 13.27e9), ("v4_pro", 1573.0e9, 48.85e9)],
)
def test_the_released_values_have_the_published_number_of_parameters(name, total, active):
    model = released_config.model_config(RELEASED[name])
    counts = count.parameters(param.declarations(transformer.Transformer(model)), top_k=model.moe.top_k)
    assert counts.total == pytest.approx(total, rel=4e-5)
    assert counts.active == pytest.approx(active, rel=4e-4)


@pytest.mark.parametrize("name", RELEASED)
def test_what_is_written_has_every_released_value(name):
    written = leaves(plain(released_config.config_json(released_config.model_config(RELEASED[name]), precision="instruct")))
    missing = {path: leaf for path, leaf in leaves(plain(RELEASED[name])).items() if written.get(path) != leaf}
    assert not missing


MODELS = {
    "small": small.config(),
    "window only": small.config("window", "window", moe={"hash_layers": 0}),
    "no yarn, no mtp": small.config("hca", "csa", attention={"yarn": None}, mtp=None),
    "text only": small.config("csa", image=None, audio=None, media_tokens=()),
    "uneven rotation": small.config(attention={"head_dim": 49, "rope_dim": 4}),  # 49 * (4 / 49) < 4
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_what_is_written_is_read_back(model):
    text = json.dumps(released_config.config_json(model))
    again = released_config.model_config(json.loads(text))
    unused = {str(i) for i, kind in enumerate(model.kinds) if kind.kind not in model.layer_kinds}
    used = model.model_copy(update={"kinds": tuple(kind for kind in model.kinds if kind.kind in model.layer_kinds)}) if unused else model
    assert again.layer_kinds == model.layer_kinds
    same = {"layers": again.layers}  # folded in another way
    assert said(again.model_copy(update=same)) == said(used.model_copy(update=same))


def test_unsaid_is_exactly_what_is_not_said():
    """Change every field, one at a time: config.json changes, or the field is listed."""
    model = small.config("csa", "hca", "csa", "hca", moe={"experts": 6, "exchange": {"capacity": 1.0}})
    before = released_config.config_json(model)
    other = {"phase": "warmup", "remat": "dots", "rope_dim": 4, "transport": "padded", "overflow": "drop"}
    other |= {"hash_table": "random", "bias_warmup_steps": 5}
    values = model.model_dump()
    for path, leaf in leaves(plain(values)).items():
        if path[0] == "layers" or path[-1] == "kind" or path in (("moe", "shared"), ("moe", "affinity"), ("moe", "clamp_shared")):
            continue  # tested with whole models, and below
        changed = copy.deepcopy(values)
        node = changed
        for key in path[:-1]:
            node = node[int(key) if isinstance(node, list | tuple) else key]
        new = other.get(path[-1], 2 * leaf if isinstance(leaf, int | float) else leaf)
        assert new != leaf, path
        if path[0] == "media_tokens":
            changed["media_tokens"] = (1, 2)
        else:
            node[path[-1]] = new
        after = released_config.config_json(config_lib.ModelConfig.model_validate(changed))
        assert (after != before) == is_said(path), path


def test_the_shared_expert_can_only_be_as_wide_as_transformers_makes_it():
    with pytest.raises(ValueError, match=r"moe.shared is 2: .* only 1 can be exported"):
        released_config.config_json(small.config(moe={"shared": 2}))


def test_what_the_released_layout_has_no_words_for_is_refused():
    with pytest.raises(ValueError, match=r"hyper.kind is residual: .* only a model trained with hyper.kind: mhc"):
        released_config.config_json(small.config(hyper={"kind": "residual"}))
    with pytest.raises(ValueError, match=r"moe.affinity is sigmoid: .* sqrt_softplus only"):
        released_config.config_json(small.config(moe={"affinity": "sigmoid"}))
    with pytest.raises(ValueError, match=r"moe.clamp_shared is false: .* cuts the shared expert, too"):
        released_config.config_json(small.config(moe={"clamp_shared": False}))


NEEDED = sorted(set(RELEASED["v4_flash"]) - set(released_config._ONLY))
NOT_NEEDED = {
    "architectures", "attention_dropout", "bos_token_id", "eos_token_id", "use_cache", "expert_dtype", "quantization_config",
    "initializer_range",
}  # fmt: skip


@pytest.mark.parametrize("key", NEEDED)
def test_no_absent_key_is_guessed(key):
    config = {name: value for name, value in RELEASED["v4_flash"].items() if name != key}
    if key in NOT_NEEDED:
        assert released_config.model_config(config) == released_config.model_config(RELEASED["v4_flash"])
    else:
        text = problems(config)
        assert "1 problem" in text
        assert f"{key} is missing" in text or f"{key} or " in text


@pytest.mark.parametrize("key", ["factor", "original_max_position_embeddings", "beta_fast", "beta_slow"])
def test_no_absent_key_of_yarn_is_guessed(key):
    config = copy.deepcopy(RELEASED["v4_flash"])
    del config["rope_scaling"][key]
    assert f"1 problem\n  rope_scaling.{key} is missing" in problems(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tie_word_embeddings", True),
        ("scoring_func", "sigmoid"),
        ("n_group", 8),
        ("topk_group", 4),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("norm_topk_prob", False),
        ("num_key_value_heads", 2),
        ("topk_method", "greedy"),
        ("model_type", "deepseek_v3"),
        ("first_k_dense_replace", 3),
        ("num_nextn_predict_layers", 2),
    ],
)
def test_what_the_model_does_not_compute_is_refused(key, value):
    text = problems({**RELEASED["v4_flash"], key: value})
    assert f"1 problem\n  {key} is {json.dumps(value)}, supported is" in text


def test_all_problems_are_told_at_once():
    config = {**RELEASED["v4_pro"], "tie_word_embeddings": True, "hidden_act": "gelu", "hc_mult": "4", "rope_scaling": {"type": "linear"}}
    del config["vocab_size"]
    text = problems(config)
    assert "5 problems" in text
    for part in ("tie_word_embeddings is true", 'hidden_act is "gelu"', 'hc_mult is "4"', "vocab_size is missing", 'of type "linear"'):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_hidden_layers": 45}, "compress_ratios has 44 entries, expected 45, or 46 with MTP"),
        ({"num_hidden_layers": 40}, "compress_ratios has 44 entries, expected 40, or 41 with MTP"),
        ({"compress_ratios": [0, 0, *[4, 128] * 20, 4, 4]}, "compress_ratios ends with [4]: the MTP block has window attention, 0"),
        ({"compress_ratios": [0, 8, *[4, 128] * 20, 4, 0]}, "compress_ratios has 8: without layer_types or compress_rates"),
        ({"compress_ratios": "0,0,4"}, 'compress_ratios is "0,0,4", expected a list of int'),
        ({"compress_ratios": [0, True]}, "compress_ratios is [0, true], expected a list of int"),
        ({"layer_types": ["sliding_attention"]}, "layer_types has 1 entries, num_hidden_layers is 43"),
        ({"layer_types": ["full_attention"] * 43}, "layer_types has unknown entries full_attention"),
        ({"compress_rates": {"compressed_sparse_attention": 8}}, "compress_ratios gives the csa layers [4], expected 8 for each"),
        ({"mlp_layer_types": ["moe", "hash_moe"] + ["moe"] * 41}, "mlp_layer_types must be 43 entries, first hash_moe, then moe"),
        ({"mlp_layer_types": ["hash_moe"] * 2 + ["moe"] * 41}, "num_hash_layers is 3, mlp_layer_types has 2"),
        ({"partial_rotary_factor": 0.25}, "qk_rope_head_dim is 64, partial_rotary_factor makes it 128"),
        ({"rope_scaling": 7}, "rope_scaling is 7, expected a mapping"),
        ({"hidden_size": 4096.0}, "hidden_size is 4096.0, expected an integer"),
        ({"num_hash_layers": True}, "num_hash_layers is true, expected an integer"),
        ({"hc_eps": float("nan")}, "hc_eps is NaN, expected a number"),
        ({"num_experts_per_tok": 300}, "moe: Value error, top_k 300 is larger than experts 256"),
        ({"swiglu_limit": 0.0}, "moe.swiglu_limit: Input should be greater than 0"),
        ({"v4train": {"video": {}}}, "v4train has unknown keys video (known: image, audio, media_tokens)"),
        ({"v4train": {"image": {"patch": 0}}}, "image.patch: Input should be greater than 0"),
    ],
)
def test_contradictions_and_wrong_values_are_refused(changes, complaint):
    text = problems({**RELEASED["v4_flash"], **changes})
    assert complaint in text


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"attention_factor": 1.277}, "attention_factor is 1.277, supported is 1.0"),
        ({"truncate": False}, "truncate is false, supported is true"),
        ({"type": "dynamic"}, 'rope_scaling is of type "dynamic"'),
        ({"factor": 0.5}, "attention.yarn.factor: Input should be greater than or equal to 1"),
    ],
)
def test_other_kinds_of_yarn_are_refused(changes, complaint):
    config = {**RELEASED["v4_flash"], "rope_scaling": {**RELEASED["v4_flash"]["rope_scaling"], **changes}}
    assert complaint in problems(config)


def test_no_yarn_has_to_be_said():
    config = {**RELEASED["v4_flash"], "rope_scaling": None}
    assert released_config.model_config(config).attention.yarn is None
    config["rope_scaling"] = {"rope_type": "default"}
    assert released_config.model_config(config).attention.yarn is None


@pytest.mark.parametrize("name", ["untied", "mixed", "yarn"])
def test_either_spelling_of_the_layers_is_enough(name):
    config = json.loads((golden.FOLDER / name / "config.json").read_text())
    both = released_config.model_config(config)
    by_types = {key: value for key, value in config.items() if key != "compress_ratios"}
    by_ratios = {key: value for key, value in config.items() if key != "layer_types"}
    assert released_config.model_config(by_types) == both
    assert released_config.model_config(by_ratios) == both
    del by_types["compress_rates"]
    assert "compress_rates has no entry for the" in problems(by_types)


def test_nested_rope_parameters_win_as_in_transformers():
    config = json.loads((golden.FOLDER / "yarn" / "config.json").read_text())
    config["rope_parameters"]["main"]["rope_theta"], config["rope_theta"] = 500.0, 10_000.0
    assert released_config.model_config(config).attention.rope_theta == 500.0
    del config["rope_parameters"]["compress"]["attention_factor"]  # without it `transformers` takes 1.277 here
    assert "rope_parameters.compress.attention_factor is null, supported is 1.0" in problems(config)
    config["rope_parameters"]["compress"]["attention_factor"] = 1.0
    config["rope_parameters"]["compress"]["partial_rotary_factor"] = 0.5
    assert "rope_parameters.compress.partial_rotary_factor makes 16 channels turn, qk_rope_head_dim is 8" in problems(config)
    config["rope_parameters"]["compress"]["partial_rotary_factor"] = None
    assert "rope_parameters.compress.partial_rotary_factor is missing" in problems(config)


@pytest.mark.parametrize("part", ["main", "compress"])
def test_half_of_the_nested_rope_parameters_is_not_the_absence_of_yarn(part):
    config = json.loads((golden.FOLDER / "yarn" / "config.json").read_text())
    del config["rope_parameters"][part]
    assert f"rope_parameters.{part} is null, expected a mapping" in problems(config)


def test_two_rotations_are_not_chosen_from():
    """`transformers` would take `rope_scaling`, whose factor is another one."""
    config = json.loads((golden.FOLDER / "yarn" / "config.json").read_text())
    config["rope_scaling"] = {**config["rope_parameters"]["compress"], "factor": 99.0}
    assert "rope_parameters and rope_scaling are both there" in problems(config)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("wwchchc", "w*2 ch*2 c"),
        ("wcwhc", "wcwhc"),
        ("ccc", "c*3"),
        ("wch", "wch"),
        ("wcchw", "w c*2 hw"),
        ("chhchh", "chh*2"),
        ("", ""),
    ],
)
def test_layers_are_folded_as_one_would_write_them(kinds, expected):
    found = released_config.runs(list(kinds))
    assert " ".join("".join(run["pattern"]) + (f"*{run['repeat']}" if run["repeat"] > 1 else "") for run in found) == expected


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_transformers_understands_what_is_written(model, tmp_path):
    """Not only the same values: its own normalisation of them (`layer_types`, `rope_parameters`) gives the same architecture."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(released_config.config_json(model)))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    names = {"window": "sliding_attention", "csa": "compressed_sparse_attention", "hca": "heavily_compressed_attention"}
    assert type(theirs).__name__ == "DeepseekV4Config"
    assert theirs.layer_types == [names[kind] for kind in model.layer_kinds]
    assert theirs.mlp_layer_types == ["hash_moe"] * model.moe.hash_layers + ["moe"] * (model.depth - model.moe.hash_layers)
    assert theirs.qk_rope_head_dim == model.attention.rope_dim
    compress = theirs.rope_parameters["compress"]
    assert compress["rope_theta"] == 160_000
    assert theirs.rope_parameters["main"]["rope_theta"] == 10_000
    assert theirs.rope_parameters["main"]["rope_type"] == "default"
    if model.attention.yarn is None:
        assert compress["rope_type"] == "default"
    else:
        assert (compress["rope_type"], compress["factor"], compress["attention_factor"]) == ("yarn", 16, 1.0)
    # What it writes itself is read as the same model again.
    theirs.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert said(released_config.model_config(again)) == said(released_config.model_config(released_config.config_json(model)))
