"""What goes wrong with a conversion: one clear message, exit code 2, and nothing half-written."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from v4train.checkpoint import arrays as arrays_lib
from v4train.cli import main
from v4train.interop import tensor_files


@pytest.fixture
def copy(exported, tmp_path):
    return pathlib.Path(shutil.copytree(exported, tmp_path / "bad"))


def refused(words, capsys, *, out: pathlib.Path) -> str:
    """The message of a command that must fail, after checking that it left nothing."""
    before = sorted(out.parent.iterdir())
    assert main.main(["convert", *map(str, words)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "Traceback" not in told.err
    assert told.err.count("v4train: ") == 1
    assert sorted(out.parent.iterdir()) == before
    return told.err


def change(copy: pathlib.Path, name: str, new: np.ndarray | None) -> None:
    """Replaces or removes a tensor, and the list of digests, which would notice first."""
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    file = index["weight_map"].pop(name)
    tensors = safetensors_numpy.load_file(copy / file)
    del tensors[name]
    if new is not None:
        tensors[name] = new
        index["weight_map"][name] = file
    safetensors_numpy.save_file(tensors, copy / file, metadata={"format": "pt"})
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "checksums.json").unlink()


def test_truncated(copy, tmp_path, capsys):
    shard = copy / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    error = refused(["import", copy, tmp_path / "out"], capsys, out=tmp_path / "out")
    assert "model-00002-of-00003.safetensors was truncated: its header describes" in error


def test_missing_shards_are_all_named(copy, tmp_path, capsys):
    (copy / "model-00001-of-00003.safetensors").unlink()
    (copy / "model-00003-of-00003.safetensors").unlink()
    error = refused(["import", copy, tmp_path / "out"], capsys, out=tmp_path / "out")
    assert "model-00001-of-00003.safetensors is missing" in error
    assert "model-00003-of-00003.safetensors is missing" in error


def test_a_wrong_digest_and_the_option_not_to_look(copy, tmp_path, capsys):
    shard = copy / "model-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    error = refused(["import", copy, tmp_path / "out"], capsys, out=tmp_path / "out")
    assert "model-00002-of-00003.safetensors does not have the digest of checksums.json: its content has changed" in error
    assert main.main(["convert", "import", str(copy), str(tmp_path / "out"), "--no-verify"]) == 0
    assert "digests not compared" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, new, problem",
    [
        ("layers.1.attn.wq_a.weight", np.zeros((32, 64), np.float64), "ill-typed"),
        ("layers.1.attn.wq_a.weight", np.zeros((32, 64), ml_dtypes.float8_e4m3fn), "missing"),
        ("layers.1.attn.wq_a.weight", np.zeros((64, 32), np.float32), "misshapen"),
        ("layers.1.attn.wq_a.weight", None, "missing"),
        ("layers.1.attn.wq_a.weight", np.full((32, 64), np.nan, np.float32), "there is NaN in it"),
    ],
)
def test_tensors_that_do_not_fit(copy, tmp_path, capsys, name, new, problem):
    change(copy, name, new)
    error = refused(["import", copy, tmp_path / "out"], capsys, out=tmp_path / "out")
    assert problem in error
    assert name.removesuffix("weight") in error


def test_a_config_without_the_needed_keys(copy, tmp_path, capsys):
    config = json.loads((copy / "config.json").read_text())
    for key in ("hidden_size", "compress_rope_theta", "n_routed_experts"):
        del config[key]
    (copy / "config.json").write_text(json.dumps(config))
    error = refused(["import", copy, tmp_path / "out"], capsys, out=tmp_path / "out")
    assert all(f"{key} is missing" in error for key in ("hidden_size", "compress_rope_theta", "n_routed_experts"))


def test_directories_that_are_none(exported, run, tmp_path, capsys):
    out = tmp_path / "out"
    assert "nowhere/config.json does not exist" in refused(["import", tmp_path / "nowhere", out], capsys, out=out)
    assert "nowhere does not exist: give a run directory" in refused(["export", tmp_path / "nowhere", out], capsys, out=out)
    out.mkdir()
    (out / "mine").write_text("precious")
    for words in (["import", exported, out], ["export", run, out]):
        assert "exists already; remove it, or choose another directory" in refused(words, capsys, out=out)
    assert (out / "mine").read_text() == "precious"


def test_options_that_make_no_sense(run, tmp_path, capsys):
    out = tmp_path / "out"
    for size in ("0.0", "inf", "nan"):
        assert f"--shard-gb {size}: give a positive number" in refused(["export", run, out, "--shard-gb", size], capsys, out=out)
    with pytest.raises(SystemExit, match="2"):
        main.main(["convert", "export", str(run), str(out), "--format", "int8"])


@contextlib.contextmanager
def small_disk(where: pathlib.Path, *, megabytes: float):
    """A file system of this size: a real one where we may mount."""
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 2**20)}", "tmpfs", str(where)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


@pytest.mark.parametrize("direction", ["import", "export"])
@pytest.mark.parametrize("seen_early", [True, False])
def test_a_full_disk(exported, run, tmp_path, capsys, monkeypatch, direction, seen_early):
    """Room is looked for before anything is written; when another program takes it meanwhile, the write fails."""
    if not seen_early:
        plenty = shutil._ntuple_diskusage(10**12, 0, 10**12)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: plenty)
        monkeypatch.setattr(tensor_files, "_require_space", lambda *_, **__: None)
    words = ["import", exported] if direction == "import" else ["export", run]
    with small_disk(tmp_path / "disk", megabytes=1.5) as disk:
        error = refused([*words, disk / "out"], capsys, out=disk / "out")
        assert "space" in error or "room" in error
        assert str(disk / "out") in error or str(disk / ".out") in error
        assert list(disk.iterdir()) == []


@pytest.mark.parametrize("direction", ["import", "export"])
def test_kill_minus_nine_leaves_nothing_that_looks_complete(exported, run, tmp_path, capsys, direction):
    """The killed conversion's remains are hidden, and the next one starts clean."""
    slow = """
import sys, time
from v4train.checkpoint import streaming
from v4train.cli import main
for owner, name in ((streaming.Writer, "write"), (streaming.Reader, "read")):
    def slowly(*words, original=getattr(owner, name), **options):
        time.sleep(0.05)
        return original(*words, **options)
    setattr(owner, name, slowly)
sys.exit(main.main(sys.argv[1:]))
"""
    words = ["convert", direction, str(exported if direction == "import" else run), str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-c", slow, *words], stdout=subprocess.DEVNULL, env=os.environ | {"XLA_FLAGS": ""})
    hidden, deadline = tmp_path / ".out.incomplete", time.monotonic() + 60
    while not any(hidden.rglob("*.safetensors" if direction == "export" else "arrays")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".out.incomplete"]
    assert main.main(words) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_array_is_an_error_of_the_input(run, tmp_path, capsys):
    """With digests switched off it is found when it is read, or not at all; with them, before."""
    damaged = pathlib.Path(shutil.copytree(run, tmp_path / "run"))
    for path in (damaged / "checkpoints/step_00000007/arrays/d").iterdir():
        path.write_bytes(b"")
    out = tmp_path / "out"
    assert "truncated or overwritten" in refused(["export", damaged, out, "--no-verify"], capsys, out=out)
    manifest = damaged / "checkpoints/step_00000007/manifest.json"
    manifest.unlink()
    assert "manifest.json is missing" in refused(["export", damaged, out], capsys, out=out)


def test_chunks_are_small_enough_for_the_memory_that_is_promised():
    """Of every released shape: what is read or written at a time follows from it."""
    assert arrays_lib.CHUNK_BYTES <= 32 * 2**20
