"""`v4train data`: the table of subcommands, and `prepare` from a spec to a store, with the exit codes of its mistakes."""

import errno
import importlib.util
import json
import pathlib

import pytest
import yaml

from tests.data.prepare import corpus
from v4train.cli import data, main
from v4train.config import load
from v4train.data import store
from v4train.data.prepare import config, part

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def spec(tmp_path) -> pathlib.Path:
    """Of a store of text, which needs no extra."""
    corpus.text_lines(tmp_path / "a.jsonl", lines=20)
    values = {"output": str(tmp_path / "out"), "licence": "CC0-1.0", "origin": "test", "workers": 1}
    values["inputs"] = [{"kind": "jsonl", "name": "a", "path": str(tmp_path / "a.jsonl")}]
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "spec.yaml"


def test_every_subcommand_can_be_imported():
    for module, text in data.SUBCOMMANDS.values():
        assert importlib.util.find_spec(module)
        assert text


def test_prepare_says_what_it_made(spec, tmp_path, capsys):
    assert main.main(["data", "prepare", str(spec)]) == 0
    said = capsys.readouterr().out
    assert "18 documents" in said
    assert "tokens/s with 1 process" in said
    assert len(store.TokenStore.open(tmp_path / "out")) == 18
    assert main.main(["data", "prepare", str(spec)]) == 0
    assert "nothing was done" in capsys.readouterr().out


def test_a_value_can_be_set_from_the_command_line(spec, tmp_path):
    assert main.main(["data", "prepare", str(spec), "--set", f"output={tmp_path}/other", "--set", "duplicates=keep"]) == 0
    assert len(store.TokenStore.open(tmp_path / "other")) == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "sources"),
        ({"inputs": [{"kind": "csv", "name": "a", "path": "x"}]}, "inputs.0"),
        ({"inputs": [{"kind": "text", "name": "a", "path": "x"}] * 2}, "two inputs are called 'a'"),
        ({"inputs": [{"kind": "text", "name": "a", "path": "nothing-here/*.txt"}]}, "names no file to read"),
        ({"image": {"patches": 3}}, "image.patches"),
        ({"tokenizer": {"kind": "huggingface", "path": "nowhere.json"}}, "nowhere.json: No such file"),
        ({"compression": 99}, "compression"),
        ({"inputs": [{"kind": "images", "name": "a", "path": "x", "layout": []}]}, "layout"),
        ({"inputs": [{"kind": "images", "name": "a", "path": "x", "layout": ["image", "image"]}]}, "names a part twice"),
        ({"inputs": [{"kind": "jsonl", "name": "a", "path": "x", "text": None}]}, "all null, so nothing is read"),
    ],
)
def test_mistakes_in_a_spec_are_told_with_code_2(spec, change, message, capsys):
    spec.write_text(yaml.safe_dump(yaml.safe_load(spec.read_text()) | change))
    assert main.main(["data", "prepare", str(spec)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_wrong_words_on_the_command_line(spec, capsys):
    assert main.main(["data", "prepare", str(spec), "--workers", "0"]) == 2
    assert "--workers 0: at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main.main(["data"])
    assert left.value.code == 2


def test_a_full_disk_is_told_with_code_1_and_leaves_no_part(spec, tmp_path, monkeypatch, capsys):
    def full(self, document):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "out"))

    with monkeypatch.context() as patched:
        patched.setattr(part._Stores, "add", full)
        assert main.main(["data", "prepare", str(spec)]) == 1
    assert "the disk is full" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out/.preparing").iterdir()] == ["plan.json"]
    assert main.main(["data", "prepare", str(spec)]) == 0


@pytest.mark.parametrize("path", sorted((ROOT / "configs/prepare").glob("*_*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_specs_are_valid(path):
    spec = load.load(path, cls=config.PrepareConfig).config
    assert json.loads(spec.model_dump_json())["inputs"]
