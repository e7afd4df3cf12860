"""`v4train bench step`: one JSON object, whose figures agree with each other and with closed forms."""

import json

import jax
import pytest

from tests.data import synthetic
from v4train import recipe as recipe_lib
from v4train.bench import step
from v4train.cli import main
from v4train.core import hardware

RECIPE = """
name: small
numerics: {{compute: float32}}
mesh: {{fsdp: 2}}
model:
  vocab_size: 272
  hidden: 16
  kinds: [{{kind: csa, ratio: 4, index_heads: 2, index_head_dim: 8, top_k: 2}}]
  layers: [{{pattern: [csa]}}]
  attention: {{heads: 2, head_dim: 8, rope_dim: 4, query_rank: 8, output_groups: 1, output_rank: 8, window: 4, chunk: 8}}
  moe: {{experts: 4, top_k: 2, ffn: 8, hash_layers: 0}}
  mtp: null
  remat: none
data:
  sequence_length: 32
  sources: [{{name: text, path: {store}, weight: 1}}]
optimizer: {{schedule: {{peak_lr: 1e-3, final_lr: 1e-3, warmup_steps: 0, decay_steps: 0}}}}
train: {{steps: 10, batch_rows: 2}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    path = folder / "small.yaml"
    path.write_text(RECIPE.format(store=synthetic.make_test_store(folder / "store", documents=60)))
    return path


def test_one_complete_object_on_stdout(recipe, capsys):
    assert main.main(["bench", "step", "--config", str(recipe), "--steps", "2", "--warmup", "1", "--set", "seed=3"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert err.count("warm-up") == 1
    assert "step 3:" in err
    assert (result["recipe"], result["overrides"], result["platform"], result["devices"]) == ("small", ["seed=3"], "cpu", 2)
    assert result["mesh"] == {"replica": 1, "fsdp": 2, "expert": 1, "context": 1, "tensor": 1}
    assert result["versions"]["jax"] == jax.__version__
    assert set(result["versions"]) == {"git", "jax", "python", "numpy"}
    assert (result["warmup_steps"], result["measured_steps"], result["tokens_per_step"]) == (1, 2, 64)
    seconds = result["step_seconds"]
    assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
    assert result["tokens_per_second"] == pytest.approx(64 / seconds["median"], rel=1e-2)
    assert 0 < result["compile_seconds"] < result["first_step_seconds"]
    assert result["mfu"] is None
    assert result["model_flops_per_token"] == pytest.approx(sum(result["model_flops_parts"].values()))
    assert result["parameters"]["total"] > result["parameters"]["active"] > 0
    assert result["peak_memory_bytes"] > 10**8
    assert result["compiled_memory"]["temp_bytes"] > 0
    optimizer, tokens = result["optimizer"], 64 * result["model_flops_per_token"]
    update = optimizer["newton_schulz_flops"] + optimizer["elementwise_flops"]
    assert optimizer["flops_share"] == pytest.approx(update / (update + tokens))
    assert 0 < optimizer["update_seconds"]["min"] <= optimizer["update_seconds"]["median"] <= optimizer["update_seconds"]["max"]
    assert optimizer["seconds_share"] == pytest.approx(optimizer["update_seconds"]["median"] / seconds["median"], rel=1e-2)
    assert 4.5 < result["loss"] < 6.5
    assert result["finite"] is True
    assert result["busiest_expert"] >= 1
    assert len(result["load_average"]["before"]) == len(result["load_average"]["after"]) == 3


def test_dense_attention_is_credited_apart(recipe, monkeypatch):
    """By hand: 32 tokens, window 4, ratio 4, top 2, 2 heads of width 8; index scores of 2 heads of width 8."""
    monkeypatch.setattr(hardware, "peak_flops", lambda kind: 1e9)
    work = step._work(recipe_lib.resolve(str(recipe)).config, rate=1000.0, devices=2)
    window = sum(min(t, 4) for t in range(1, 33))
    entries = sum(min(t // 4, 2) for t in range(1, 33))
    scores = sum(t // 4 for t in range(1, 33))
    sparse = 3 * (4 * 2 * 8 * (window + entries) + 2 * 2 * 8 * scores) / 32
    dense = 3 * 4 * 2 * 8 * sum(range(1, 33)) / 32
    assert work["dense_credit_flops_per_token"] - work["model_flops_per_token"] == pytest.approx(dense - sparse)
    assert work["mfu"] == pytest.approx(1000.0 * work["model_flops_per_token"] / 2e9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps 0: at least one step must be measured"),
        (["--warmup", "-1"], "--warmup -1: give 0 or more"),
        (["--set", "model.hiden=8"], "hiden"),
    ],
)
def test_wrong_arguments_are_one_message(recipe, capsys, words, message):
    assert main.main(["bench", "step", "--config", str(recipe), *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_a_measurement_must_be_named(capsys):
    with pytest.raises(SystemExit) as caught:
        main.main(["bench"])
    assert caught.value.code == 2
    assert "<what>" in capsys.readouterr().err
