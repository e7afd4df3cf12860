"""`v4train bench decode`: what is counted, that full caches are what a decoder would have, and that quality notices what it should."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import small
from v4train.bench.decode import filled, latency, memory, million, needle, quality, report, speed
from v4train.cli import main
from v4train.core import param
from v4train.data import store
from v4train.decode import loading
from v4train.decode import prompt as prompt_lib
from v4train.model import transformer
from v4train.numerics import config as numerics_config

LENGTH = 512


@pytest.fixture(scope="module")
def model():
    return small.config(vocab_size=272, mtp=None)


@pytest.fixture(scope="module")
def loaded():
    model = small.config("csa", vocab_size=272, mtp=None, image=None, audio=None, media_tokens=())
    params = param.initialise(param.declarations(transformer.Transformer(model)), 0)
    return loading.Loaded("small", 1, model, params, needle.TOKENIZER, numerics_config.NumericsConfig(compute="float32"))


@pytest.mark.parametrize("hot_entries", [None, 16])
def test_memory_counts_what_a_decoder_holds(model, hot_entries):
    layout = memory.layout(model, cache="fp8", length=LENGTH, hot_entries=hot_entries)
    assert memory.parts(layout)["total"] == sum(x.nbytes for x in jax.tree.leaves(layout.empty()))


def test_tiers_save_from_the_crossover_on(model):
    at = memory.crossover(model, hot_entries=128)
    rows = memory.measure(model, lengths=(at - 256, at), hot_entries=128)["lengths"]
    assert rows[0]["saved_on_device"] <= 0 < rows[1]["saved_on_device"]
    assert rows[1]["host"] == rows[1]["fp8"]["selected"]


def test_memory_from_the_command_line(capsys):
    assert main.main(["bench", "decode", "memory", "--lengths", "32768", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["per_token_bytes"] == {"bf16": 6880.0, "fp8": 3834.5}  # 21 x (1024 + 256) / 4 + 20 x 1024 / 128, and MODEL1 likewise
    assert result["lengths"][0]["saved"] > 0.4
    assert result["lengths"][0]["saved_on_device"] > 0.4
    assert "41.0%" in report.memory(result)


@pytest.mark.parametrize("mode", ["dense-bf16", "sparse-fp8"])
def test_a_filled_cache_goes_on_like_one_that_was_read(loaded, mode):
    """Same shapes and dtypes, every page in its place, and finite logits that depend on what was filled in far away."""
    decoder = filled.decoder(loaded.model, loaded.params, filled.config(mode, length=LENGTH))
    cache = filled.fill(decoder.layout, length=LENGTH - 8)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), cache) == jax.tree.map(lambda x: (x.shape, x.dtype), decoder.empty())
    assert int(cache.lengths[0]) == LENGTH - 8
    run, place, _ = speed.csa_layer(loaded.model)
    other = jax.tree.map(jnp.array, cache)
    other.layers[run][place] = other.layers[run][place]._replace(entries=jax.tree.map(jnp.zeros_like, other.layers[run][place].entries))
    logits = [np.asarray(decoder.step(each, tokens=np.array([3], np.int32), active=np.array([True])).logits) for each in (cache, other)]
    assert np.isfinite(logits[0]).all()
    assert np.abs(logits[0] - logits[1]).max() > 1e-6


def test_speed_reports_every_mode(loaded):
    result = speed.measure(
        loaded.model, lengths=(256,), step_lengths=(256,), growth_lengths=(256, 512), batches=(2, 3), rounds=1, say=lambda _: None
    )
    (row,) = result["attention"]
    assert set(row["modes"]) == set(filled.MODES)
    assert [("scan" in row["modes"][mode]) for mode in filled.MODES] == [False, False, True, True]
    assert [step["sequences"] for step in result["steps"]] == [2, 3, 1]
    assert (result["steps"][2]["growth"]["from"], result["steps"][2]["growth"]["to"]) == (256, 512)
    assert all(row["speedup_cpu"] > 0 for row in (row, *result["steps"][0]["rows"]))
    assert all(set(row["cpu"]) == set(row["modes"]) for step in result["steps"] for row in step["rows"])
    assert "fp8 vs dense bf16" in report.speed(result)
    assert "in seconds of a core" in report.speed(result)


def test_small_widths_leave_attention_as_it_is():
    true, small = (filled.model(widths=widths) for widths in ("true", "small"))
    assert small.hidden < true.hidden
    changed = {"query_rank": true.attention.query_rank, "output_rank": true.attention.output_rank}
    assert small.attention.model_copy(update=changed) == true.attention
    assert (small.kinds, small.layers) == (true.kinds, true.layers)


def test_latency_has_every_tier(loaded, monkeypatch):
    pytest.importorskip("google_crc32c")
    monkeypatch.setattr(million, "model", lambda *, tokens: loaded.model)
    modes = ("sparse-fp8", "sparse-fp8 host", "sparse-fp8 disk")
    measured = {
        "lengths": (4096, 8192),
        "prompt_lengths": (4096, 8192),
        "modes": modes,
        "hot": 16,
        "rounds": 2,
        "chunk": 1024,
        "say": lambda _: None,
    }
    result = latency.measure(loaded.model, **measured)
    for row in result["lengths"]:
        plain, host, disk = (row["modes"][mode]["bytes"] for mode in modes)
        assert plain["device"] > host["device"] == disk["device"]
        segments = row["length"] // 256  # of the only layer, filled
        assert host["host"] == segments * plain_entries(loaded.model)
        assert disk["host"] == host["host"] // 4
        assert disk["host"] + disk["disk"] >= host["host"], "what has no room in memory lies in the file"
        assert 0 <= row["modes"]["sparse-fp8 host"]["hot"] <= 1
    short, long = (row["modes"]["sparse-fp8"]["first_token_seconds"] for row in result["lengths"])
    assert 0 < short < long
    assert "sparse-fp8 disk" in report.latency(result)
    with pytest.raises(ValueError, match="give multiples of the chunk"):
        latency.measure(loaded.model, **measured | {"prompt_lengths": (1000,)})


def plain_entries(model) -> int:
    """Bytes of a page's entries in one layer."""
    a = model.attention
    return 64 * ((a.head_dim - a.rope_dim) + 2 * a.rope_dim + 8)


def test_tiers_that_change_a_logit_are_said(loaded, monkeypatch):
    pytest.importorskip("google_crc32c")
    monkeypatch.setattr(million, "model", lambda *, tokens: loaded.model)
    given = {mode: np.array([float(i)]) for i, mode in enumerate(latency.MODES)}
    monkeypatch.setattr(latency, "first_token", lambda *_, mode, **__: ({256: 1.0}, given[mode]))
    monkeypatch.setattr(latency, "per_token", lambda *_, **__: {mode: {} for mode in latency.MODES})
    with pytest.raises(ValueError, match="sparse-bf16 host: the logits after 256 tokens are not those of sparse-bf16"):
        latency.measure(loaded.model, lengths=(256,), prompt_lengths=(256,), rounds=1, chunk=256, say=lambda _: None)


@pytest.mark.slow  # three decoders, two minutes on a busy machine
def test_a_cache_in_fp32_agrees_with_the_training_forward_pass(loaded):
    """Perplexity from the decoder equals that of one forward pass without a cache."""
    texts = [np.asarray(needle.prompt(length=n, depth=0.5, seed=n)[0]) for n in (100,)]
    found = quality.forcing(loaded, texts)
    abstract, nats, targets = transformer.Transformer(loaded.model), 0.0, 0
    for text in texts:
        prompt = prompt_lib.Prompt.of_tokens(text)
        bound = param.bind(abstract, loaded.params)
        log = jax.nn.log_softmax(bound.logits(bound(prompt.chunk(0, size=len(text))).hidden)[0])
        nats -= float(log[np.arange(len(text) - 1), text[1:]].sum())
        targets += len(text) - 1
    assert found["fp32"]["targets"] == targets
    assert np.isclose(np.log(found["fp32"]["perplexity"]), nats / targets, rtol=1e-5)
    assert found["bf16"]["agreement"] == 1.0
    assert found["fp8"]["divergence"] > found["bf16"]["divergence"] == 0.0


def test_recall_is_whole_without_rounding_and_falls_with_it(loaded, monkeypatch):
    texts = [needle.prompt(length=256, depth=0.5, seed=0)[0]]
    coded = quality.recall(loaded, texts)
    assert coded["queries"] > 0
    assert 0.5 < coded["recall"] < 1.0

    @dataclasses.dataclass(frozen=True)
    class Exact:
        encode = staticmethod(lambda x: x)
        decode = staticmethod(lambda x, *, dtype: x)

    monkeypatch.setattr(quality.formats, "of_index_keys", lambda *_, **__: Exact())
    assert quality.recall(loaded, texts)["recall"] == 1.0


def test_a_needle_stands_once_and_is_asked_for():
    for depth in (0.0, 0.5, 1.0):
        tokens, answer = needle.prompt(length=300, depth=depth, seed=1)
        text = bytes(tokens[1:].tolist()).decode()
        key = text[-1]
        assert text.count(key) == 2
        at = text.index(key)
        assert text[at + 1] == chr(answer)
        assert abs(at / 300 - depth) < 0.1


def test_documents_repeat_their_facts(tmp_path):
    needle.write_store(tmp_path / "store", documents=4, length=300)
    opened = store.TokenStore.open(tmp_path / "store")
    for i in range(4):
        text = bytes(opened.read(i).tokens[1:-1].astype(np.uint8).tolist()).decode()
        facts = [text[j : j + 2] for j in range(len(text) - 1) if text[j].isupper()]
        assert len(facts) > len({fact[0] for fact in facts})  # some key comes again
        assert len({fact[0] for fact in facts}) == len(set(facts))  # and always with its value


def test_bad_lengths_are_said(capsys):
    assert main.main(["bench", "decode", "memory", "--lengths", "many"]) == 2
    assert "'many': give whole numbers" in capsys.readouterr().err


@pytest.mark.slow
def test_a_long_prompt_is_computed_once_and_then_found_on_disk(capsys):
    """Two processes of their own, each of which compiles."""
    assert main.main(["bench", "decode", "million", "--tokens", "1024", "--chunk", "256", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["computed"]["cached_tokens"], result["from_disk"]["cached_tokens"]) == (0, 768)
    assert result["computed"]["answer"] == result["from_disk"]["answer"]
    assert result["computed"]["bytes_by_tier"]["disk"] > 0
