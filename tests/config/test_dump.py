"""The resolved config as text: it loads back to the same values, and the hash depends on nothing else."""

import hashlib
import json

import pydantic
import pytest
import yaml

from v4train.config import base, dump, load


class Part(base.Config):
    rate: float = 1e-20
    names: tuple[str, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()


class Whole(base.Config):
    zeta: int = 1
    alpha: Part = Part()
    table: dict[str, float] = pydantic.Field(default_factory=dict)
    none: str | None = None


TRICKY = (
    "1e-20",
    "1e3",
    "yes",
    "no",
    "on",
    "null",
    "~",
    "",
    "010",
    "0x1f",
    "1_000",
    "12:30",
    "2026-01-01",
    "a: b",
    "- x",
    "é",
    "#c",
    " s ",
    "=",
)


def test_yaml_round_trip(tmp_path):
    config = Whole(alpha=Part(rate=3.1e-17, names=TRICKY, pairs=((1, 2), (3, 4))), table={name: 0.1 for name in TRICKY})
    path = tmp_path / "resolved.yaml"
    path.write_text(dump.yaml_text(config))
    assert load.load(path, cls=Whole).config == config


def test_yaml_is_also_what_a_yaml_1_1_reader_understands():
    config = Whole(alpha=Part(names=tuple(name for name in TRICKY if name != "1e3")))
    assert yaml.safe_load(dump.yaml_text(config)) == json.loads(dump.canonical_json(config))


def test_yaml_text_is_sorted():
    assert dump.yaml_text(Whole()) == "alpha:\n  names: []\n  pairs: []\n  rate: 1.0e-20\nnone: null\ntable: {}\nzeta: 1\n"


def test_canonical_json_and_its_digest():
    text = '{"alpha":{"names":["\\u00e9"],"pairs":[],"rate":1e-20},"none":null,"table":{},"zeta":1}'
    config = Whole(alpha=Part(names=("é",)))
    assert dump.canonical_json(config) == text
    assert dump.digest(config) == hashlib.sha256(text.encode()).hexdigest()


def test_digest_depends_on_values_only(tmp_path):
    (tmp_path / "a.yaml").write_text("table: {x: 1, y: 2}\nzeta: 3\n")
    (tmp_path / "b.yaml").write_text("base: c.yaml\ntable: {y: 2.0}\n")
    (tmp_path / "c.yaml").write_text("zeta: 4\ntable:\n  y: 7\n  x: 1e0\n")
    a = load.load(tmp_path / "a.yaml", cls=Whole).config
    b = load.load(tmp_path / "b.yaml", cls=Whole, overrides=["zeta=3"]).config
    assert dump.digest(a) == dump.digest(b)
    assert dump.digest(a) != dump.digest(a.model_copy(update={"zeta": 5}))


def test_difference():
    a = Whole(alpha=Part(names=("x", "y"), pairs=((1, 2),)), table={"p": 1.0, "q": 2.0})
    b = Whole(zeta=2, alpha=Part(names=("x", "z", "w"), pairs=((1, 3),)), table={"p": 1.0, "r": 2.0}, none="n")
    expected = ["alpha.names.1", "alpha.names.2", "alpha.pairs.0.1", "none", "table.q", "table.r", "zeta"]
    assert dump.difference(a, b) == expected
    assert dump.difference(json.loads(dump.canonical_json(a)), b) == expected
    assert dump.difference(a, a) == []


@pytest.mark.parametrize(
    ("x", "y", "keys"), [(True, 1, ["k"]), (1, 1.0, []), ({"a": 1}, 2, ["k"]), ("ab", ["a", "b"], ["k"]), ({}, [], ["k"])]
)
def test_difference_of_unlike_types(x, y, keys):
    assert dump.difference({"k": x}, {"k": y}) == keys


def test_nan_has_no_canonical_form():
    with pytest.raises(ValueError, match="Out of range float values"):
        dump.canonical_json({"x": float("nan")})
