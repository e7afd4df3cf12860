"""What a recipe says of decoding holds unless an option says otherwise; what means nothing is refused."""

import argparse
import functools
import shutil

import pytest

from tests.decode import sequences
from tests.interop import steps
from v4train import recipe
from v4train.cli import decode_options, main, serve
from v4train.config import dump
from v4train.decode import config, loading
from v4train.decode import decoder as decoder_lib
from v4train.train import run as run_lib

TIERS = {"hot_entries": 32, "host_bytes": 10**6, "disk": {"path": "there", "bytes": 10**7}}
SMALL = ("model.layers=[{pattern: [csa]}]", "model.moe.hash_layers=1", "model.audio=null", "data.max_audio_frames=0")


@pytest.fixture(autouse=True)
def _compiled_fast(monkeypatch):
    """Few tokens are decoded here, and what takes the time is to compile for them."""
    monkeypatch.setattr(decoder_lib, "Decoder", functools.partial(decoder_lib.Decoder, compiler_options=sequences.FAST))


def merged(*words: str, **said) -> dict:
    """Of the recipe's section and a command line, what differs from the defaults."""
    parser = argparse.ArgumentParser()
    serve.configure(parser)
    args = parser.parse_args(["somewhere", *words])
    decode_options.check(args)
    found = dump.values(decode_options._merged(args, config.DecodingConfig.model_validate(said)))
    return {key: value for key, value in found.items() if value != dump.values(config.DecodingConfig())[key]}


def test_without_section_and_options_the_defaults_are_what_they_were():
    assert merged() == {}
    known = {"cache": "bf16", "prefill_chunk": 512, "speculate": False, "tiers": None, "prefix_bytes": None, "keep_answers": False}
    assert dump.values(config.DecodingConfig()) == known | {"slots": 8, "max_length": None, "device_bytes": None}


def test_options_are_laid_over_the_section():
    said = {"cache": "fp8", "prefill_chunk": 64, "speculate": True, "tiers": TIERS, "slots": 2, "prefix_bytes": 5}
    assert merged(**said) == said
    assert merged("--cache", "fp32", "--chunk", "32", "--no-speculate", "--slots", "3", "--prefix-bytes", "6", **said) == {
        "cache": "fp32",
        "prefill_chunk": 32,
        "tiers": TIERS,
        "slots": 3,
        "prefix_bytes": 6,
    }
    assert merged("--keep-answers") == {"keep_answers": True}
    assert merged("--no-keep-answers", keep_answers=True) == {}
    assert merged("--host-cache", "2MiB", tiers=TIERS) == {"tiers": TIERS | {"host_bytes": 2**21}}
    assert merged("--hot-entries", "64", tiers=TIERS) == {"tiers": TIERS | {"hot_entries": 64}}
    assert merged("--disk-cache", "here", tiers=TIERS) == {"tiers": TIERS | {"disk": {"path": "here", "bytes": 10**7}}}
    assert merged("--disk-cache-bytes", "1GiB", tiers=TIERS) == {"tiers": TIERS | {"disk": {"path": "there", "bytes": 2**30}}}
    assert merged("--no-tiers", tiers=TIERS) == {}


def test_options_alone_make_tiers():
    assert merged("--host-cache", "2MiB") == {"tiers": {"hot_entries": 1024, "host_bytes": 2**21, "disk": None}}
    disk = {"path": "here", "bytes": 20 * 2**30}
    assert merged("--disk-cache", "here") == {"tiers": {"hot_entries": 1024, "host_bytes": 2**30, "disk": disk}}


@pytest.mark.parametrize(
    ("words", "said", "message"),
    [
        (["--hot-entries", "64"], {}, "--hot-entries: it means nothing without --host-cache or --disk-cache"),
        (["--disk-cache-bytes", "1GiB", "--host-cache", "1MiB"], {}, "--disk-cache-bytes: it means nothing without --disk-cache"),
        (["--no-tiers", "--host-cache", "1MiB"], {"tiers": TIERS}, "--no-tiers and --host-cache: give one of them"),
        (["--chunk", "0"], {}, "--chunk 0: give at least 1"),
    ],
)
def test_what_means_nothing_is_refused(words, said, message):
    with pytest.raises(ValueError, match=message):
        merged(*words, **said)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("decode.max_length=70000", "decode.max_length 70000 exceeds model.max_positions 65536"),
        ("decode.tiers={hot_entries: 8}", "decode.tiers.host_bytes"),
        ("decode.tiers={host_bytes: 0}", "decode.tiers.host_bytes = 0"),
    ],
)
def test_a_recipe_is_checked_before_it_is_trained(override, message):
    with pytest.raises(ValueError, match=message):
        recipe.resolve("configs/tiny.yaml", overrides=[override])
    with pytest.raises(ValueError, match=r"decode\.speculate is true, but the model has no MTP block"):
        recipe.resolve("configs/tiny.yaml", overrides=["model.mtp=null", "decode.speculate=true"])


def test_a_resumed_run_may_change_it():
    assert "decode" in run_lib.MAY_CHANGE


def test_a_checkpoint_brings_its_section_along(tmp_path, capsys):
    """Answers from a recipe's tiers, prefixes found on its disk, and drafts: nothing of it is on the command line."""
    pytest.importorskip("google_crc32c")
    tiers = f"{{hot_entries: 32, host_bytes: 8e6, disk: {{path: {tmp_path}/disk, bytes: 1e9}}}}"
    section = f"{{cache: fp8, prefill_chunk: 32, speculate: true, tiers: {tiers}}}"
    made = steps.recipe("configs/tiny.yaml", *SMALL, f"decode={section}")
    steps.write(tmp_path / "run", made, steps.values(made.model))
    assert loading.load(tmp_path / "run", mtp=None).decode == made.decode
    words = ["generate", str(tmp_path / "run"), "--prompt", "x" * 300, "--temperature", "0", "--max-tokens", "6", "--compute", "float32"]
    said = []
    for more in ([], [], ["--no-tiers", "--no-speculate"]):
        assert main.main([*words, *more]) == 0
        said.append(capsys.readouterr())
    assert len({each.out for each in said}) == 1
    assert [each.err.count("bytes (fp8)") for each in said] == [1, 1, 1]
    assert ", 256 prompt tokens taken up" in said[1].err
    assert "drafts right" in said[1].err
    assert "taken up" not in said[2].err
    assert "drafts" not in said[2].err


def test_an_older_checkpoint_has_the_defaults(tmp_path, monkeypatch):
    made = steps.recipe("configs/tiny.yaml", *SMALL)
    values = dump.values(made)
    del values["decode"]
    monkeypatch.setattr(dump, "values", lambda _: values)
    steps.write(tmp_path / "run", made, steps.values(made.model))
    assert loading.load(tmp_path / "run").decode == config.DecodingConfig()
    shutil.rmtree(tmp_path / "run")
