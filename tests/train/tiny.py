"""A recipe small enough to compile in seconds, with every part of the large ones, on stores that are written anew for each test run."""

import pathlib
from typing import Any

import yaml

from tests.data import synthetic
from v4train import recipe as recipe_lib

SEQUENCE, PATCH, VOCAB = 64, 2, 272


def stores(directory: pathlib.Path) -> pathlib.Path:
    """Writes one store of text and one of images, sounds and text into a directory, and returns it."""
    synthetic.make_test_store(directory / "text", documents=60, seed=1)
    synthetic.make_test_store(directory / "media", documents=60, kind="media", patch=PATCH, seed=2)
    return directory


def values(data: pathlib.Path, run: pathlib.Path, /, **changes: Any) -> dict[str, Any]:
    """The recipe as nested dicts; changes as ``train={"steps": 3}``, merged one level deep."""
    attention = {
        "heads": 4,
        "head_dim": 16,
        "rope_dim": 8,
        "query_rank": 16,
        "output_groups": 2,
        "output_rank": 16,
        "window": 16,
        "chunk": 32,
    }
    base: dict[str, Any] = {
        "name": "tiny",
        "numerics": {"compute": "float32"},
        "model": {
            "vocab_size": VOCAB,
            "hidden": 32,
            "kinds": [
                {"kind": "window"},
                {"kind": "csa", "ratio": 4, "index_heads": 2, "index_head_dim": 8, "top_k": 4},
                {"kind": "hca", "ratio": 8},
            ],
            "layers": [{"pattern": ["hca", "csa"]}],
            "attention": attention | {"window": 16, "chunk": 32},
            "hyper": {"streams": 2, "iterations": 5},
            "moe": {"experts": 8, "top_k": 2, "ffn": 16, "hash_layers": 1, "bias_speed": 0.01},
            "image": {"patch": PATCH, "grid": 8},
            "audio": {},
            "media_tokens": [259, 260, 261, 262, 263, 264],
            "max_positions": 1024,
            "remat": "none",
        },
        "data": {
            "sequence_length": SEQUENCE,
            "image_patch": PATCH,
            "max_patches": 30,
            "max_audio_frames": 30,
            "holdout": 0.1,
            "sources": [
                {"name": "text", "path": str(data / "text"), "weight": 0.5},
                {"name": "media", "path": str(data / "media"), "weight": 0.5, "packing": "no_split"},
            ],
        },
        "optimizer": {"schedule": {"peak_lr": 3e-3, "final_lr": 3e-4, "warmup_steps": 2, "decay_steps": 2}},
        "train": {"steps": 6, "batch_rows": 8, "eval_every": 3, "log_every": 2, "experts_every": 2, "run_directory": str(run)},
        "checkpoint": {"every_steps": 2, "keep": {"kind": "latest", "count": 3}},
    }
    for name, change in changes.items():
        base[name] = base.get(name, {}) | change if isinstance(change, dict) else change
    return base


def recipe(data: pathlib.Path, /, **changes: Any) -> recipe_lib.Recipe:
    """The recipe itself, for tests that train without a run directory."""
    return recipe_lib.Recipe.model_validate(values(data, data / "run", **changes))


def write(path: pathlib.Path, data: pathlib.Path, run: pathlib.Path, /, **changes: Any) -> pathlib.Path:
    """The recipe as a file."""
    path.write_text(yaml.safe_dump(values(data, run, **changes)), encoding="utf-8")
    return path
