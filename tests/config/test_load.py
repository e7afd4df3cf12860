"""Recipes: what a word means, base chains, overrides, and above all what a wrong recipe is answered with."""

import pathlib
from typing import Annotated, Literal

import pydantic
import pytest

from v4train.config import base, load


class Window(base.Config):
    kind: Literal["window"]
    width: int = pydantic.Field(gt=0)
    """Tokens that a query sees."""


class Sparse(base.Config):
    kind: Literal["sparse"]
    top_k: int = 4
    ratio: float = 0.5


Attention = Annotated[Window | Sparse, pydantic.Field(discriminator="kind")]


class Model(base.Config):
    layers: tuple[Attention, ...] = ()
    last: Attention | None = None
    activation: Literal["silu", "gelu"] = "silu"
    pair: tuple[int, int] = (1, 2)
    count: int | Literal["auto"] = "auto"
    table: dict[str, int] = pydantic.Field(default_factory=dict)


class Recipe(base.Config):
    model: Model = Model()
    steps: int = 1
    lr: float = 0.1
    name: str = "x"
    flag: bool = False
    out: pathlib.Path | None = None

    @pydantic.model_validator(mode="after")
    def _check(self):
        if self.steps == 13:
            raise ValueError("13 steps bring bad luck; use 14")
        return self


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "r.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    return write


def problems(name: str, *overrides: str) -> list[str]:
    """The lines of the problems, without the title."""
    with pytest.raises(load.ConfigError) as caught:
        load.load(name, cls=Recipe, overrides=overrides)
    assert isinstance(caught.value, ValueError)
    assert len(caught.value.problems) == str(caught.value).count("\n    ")
    return [f"{p.where} | {p.path} | {p.found} | {p.remedy}" for p in caught.value.problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-20", 1e-20), ("3e-4", 3e-4), ("1E5", 1e5), (".5", 0.5), ("5.", 5.0), ("-1.5e+3", -1500.0), ("7", 7.0), ("1_000.5", 1000.5)],
)
def test_floats_of_every_spelling(write, text, value):
    lr = load.load(write(f"lr: {text}"), cls=Recipe).config.lr
    assert isinstance(lr, float)
    assert lr == value


@pytest.mark.parametrize(("text", "value"), [("1_000_000", 10**6), ("1e9", 10**9), ("010", 10), ("0x10", 16), ("-3", -3), ("2.0", 2)])
def test_integers_of_every_spelling(write, text, value):
    steps = load.load(write(f"steps: {text}"), cls=Recipe).config.steps
    assert isinstance(steps, int)
    assert steps == value


@pytest.mark.parametrize("text", ["yes", "no", "on", "12:30", "2026-01-01", "1e", "e5", "1_", "'3'", '"true"', "<<", "="])
def test_words_that_are_strings(write, text):
    assert load.load(write(f"name: {text}"), cls=Recipe).config.name == text.strip("'\"")


def test_nested_unions_tuples_and_paths(write):
    text = """
model:
  layers:
    - {kind: window, width: 3}
    - kind: sparse
      ratio: 1
  last: {kind: sparse}
  pair: [5, 6]
  count: 8
  table: {a: 1, 2: 3}
out: some/where
"""
    config = load.load(write(text), cls=Recipe).config
    assert config == Recipe(
        model=Model(
            layers=(Window(kind="window", width=3), Sparse(kind="sparse", ratio=1.0)),
            last=Sparse(kind="sparse"),
            pair=(5, 6),
            count=8,
            table={"a": 1, "2": 3},
        ),
        out=pathlib.Path("some/where"),
    )


def test_empty_recipe_is_all_defaults(write):
    assert load.load(write("# nothing\n"), cls=Recipe).config == Recipe()


def test_base_chain_merges_and_remembers_lines(write):
    write("steps: 1\nlr: 0.5\nmodel:\n  pair: [1, 2]\n  table: {a: 1, b: 2}\n", "lib/grand.yaml")
    write("base: lib/grand.yaml\nsteps: 2\nmodel: {table: {b: 3}}\n", "parent.yaml")
    name = write("base: ../parent.yaml\n\nmodel:\n  pair: [3, 4]\n", "runs/child.yaml")
    loaded = load.load(name, cls=Recipe, overrides=["name=n"])
    assert loaded.config == Recipe(steps=2, lr=0.5, name="n", model=Model(pair=(3, 4), table={"a": 1, "b": 3}))
    assert loaded.overrides == ("name=n",)
    assert dict(loaded.sources) == {
        "steps": "parent.yaml:2",
        "lr": "lib/grand.yaml:2",
        "model.pair.0": "runs/child.yaml:4",
        "model.pair.1": "runs/child.yaml:4",
        "model.table.a": "lib/grand.yaml:5",
        "model.table.b": "parent.yaml:3",
        "name": "--set name=n",
    }
    assert loaded.where("lr") == "lib/grand.yaml:2"
    assert loaded.where("model.pair") == "runs/child.yaml:4"
    assert loaded.where("model.activation") == "runs/child.yaml:4"  # a default: the nearest part that was given


def test_errors_name_the_file_that_supplied_the_value(write):
    write("steps: a\nmodel:\n  activation: relu\n", "parent.yaml")
    name = write("base: parent.yaml\nmodel:\n  pair: [1, b]\n")
    assert problems(name, "lr=fast") == [
        'parent.yaml:1 | steps | "a" | expected an integer',
        'parent.yaml:3 | model.activation | "relu" | expected one of silu, gelu; did you mean `gelu`?',
        'r.yaml:3 | model.pair.1 | "b" | expected an integer',
        '--set lr=fast | lr | "fast" | expected a number',
    ]


def test_a_different_kind_replaces_the_mapping(write):
    write("model:\n  last: {kind: sparse, top_k: 9, ratio: 0.1}\n", "parent.yaml")
    same = write("base: parent.yaml\nmodel: {last: {kind: sparse, top_k: 8}}\n")
    assert load.load(same, cls=Recipe).config.model.last == Sparse(kind="sparse", top_k=8, ratio=0.1)
    assert load.load(same, cls=Recipe, overrides=["model.last.kind=window", "model.last.width=2"]).config.model.last == Window(
        kind="window", width=2
    )
    other = write("base: parent.yaml\nmodel: {last: {kind: window, width: 8}}\n")
    assert load.load(other, cls=Recipe).config.model.last == Window(kind="window", width=8)


def test_circle_of_bases(write):
    write("base: a.yaml", "b.yaml")
    assert problems(write("\nbase: b.yaml", "a.yaml")) == [
        "b.yaml:1 | base | a.yaml | the files name each other in a circle: a.yaml -> b.yaml -> a.yaml"
    ]


def test_unreadable_files(write, tmp_path):
    assert problems("absent.yaml") == ["absent.yaml |  |  | cannot read it: No such file or directory"]
    assert problems(write("\nbase: absent.yaml")) == ["r.yaml:2 | base | absent.yaml | cannot read it: No such file or directory"]
    assert problems(write("base: [a, b]")) == ['r.yaml:1 | base | ["a", "b"] | `base` names one file, relative to this one']
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff\xfe")
    assert problems("binary.yaml") == ["binary.yaml |  |  | not a text file (UTF-8): byte 3"]
    assert problems(write("name: a\x00b")) == ["r.yaml:1 |  |  | the character '\\x00' is not allowed in YAML"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model:\n\tpair: 3", "r.yaml:2:1 |  |  | bad YAML: while scanning for the next token found character '\\t'"),
        ("a: 1\nb: [1, 2\nc: 3", "r.yaml:3:2 |  |  | bad YAML: while parsing a flow sequence"),
        ("- 1\n- 2", "r.yaml:1 |  | [1, 2] | a recipe is a mapping"),
        ("just words", 'r.yaml:1 |  | "just words" | a recipe is a mapping'),
        ("steps: 1\n---\nsteps: 2", "r.yaml:2:1 |  |  | bad YAML: expected a single document"),
        ("model: &m\n  table: *m", "r.yaml:1 | model.table |  | a value that contains itself"),
        ("? [a]\n: 1", "r.yaml:1 |  |  | a key must be a single word"),
        ("name: !!python/name:os.system x", "r.yaml:1 | name |"),
        ("steps: !!int many", "r.yaml:1 | steps | \"many\" | 'many' is not a valid int"),
    ],
)
def test_what_is_not_a_recipe(write, text, line):
    assert problems(write(text))[0].startswith(line)


def test_tabs_have_a_remedy(write):
    assert problems(write("model:\n\tpair: 3"))[0].endswith("indent with spaces, not tabs")


def test_duplicate_keys_are_reported_with_the_rest(write):
    assert problems(write("steps: 1\nmodel:\n  pair: [1, 2]\n  pair: [3, 4]\nsteps: 2\nlr: x")) == [
        "r.yaml:4 | model.pair |  | duplicate key: it is already given at r.yaml:3; keep one of the two",
        "r.yaml:5 | steps |  | duplicate key: it is already given at r.yaml:1; keep one of the two",
        'r.yaml:6 | lr | "x" | expected a number',
    ]


def test_every_kind_of_wrong_value_at_once(write):
    text = """model:
  layers:
    - {kind: window, width: 0}
    - kind: sparce
    - top_k: 3
    - kind: sparse
      topk: 3
      ratio: .inf
    - 7
  last:
    kind: window
  pair: [1, 2, 3]
  count: many
  table: {a: x}
steps: 2.5
lr: "3"
name: 12
flag: yes
lrr: {b: 1}
out:
"""
    assert problems(write(text)) == [
        "r.yaml:3 | model.layers.0.width | 0 | expected a value greater than 0 (Tokens that a query sees.)",
        'r.yaml:4 | model.layers.1.kind | "sparce" | expected one of window, sparse; did you mean `sparse`?',
        "r.yaml:5 | model.layers.2.kind |  | required, but missing (allowed: window, sparse)",
        "r.yaml:7 | model.layers.3.topk | 3 | unknown key; did you mean `top_k`? (allowed: kind, ratio, top_k)",
        "r.yaml:8 | model.layers.3.ratio | inf | expected a finite number",
        "r.yaml:9 | model.layers.4 | 7 | expected a mapping with `kind`: one of window, sparse",
        "r.yaml:10 | model.last.width |  | required, but missing: give an integer (Tokens that a query sees.)",
        "r.yaml:12 | model.pair | [1, 2, 3] | expected a list of at most 2 items, found 3",
        'r.yaml:13 | model.count | "many" | expected an integer or one of auto',
        'r.yaml:14 | model.table.a | "x" | expected an integer',
        "r.yaml:15 | steps | 2.5 | expected an integer",
        'r.yaml:16 | lr | "3" | expected a number',
        "r.yaml:17 | name | 12 | expected a string: put it in quotes",
        'r.yaml:18 | flag | "yes" | expected true or false',
        "r.yaml:19 | lrr | a mapping with the keys b | unknown key; did you mean `lr`? (allowed: flag, lr, model, name, out, steps)",
    ]


def test_booleans_are_not_numbers(write):
    assert problems(write("steps: true\nlr: false\nflag: 1")) == [
        "r.yaml:1 | steps | true | expected an integer",
        "r.yaml:2 | lr | false | expected a number",
        "r.yaml:3 | flag | 1 | expected true or false",
    ]


def test_an_empty_section_and_a_scalar_section(write):
    assert problems(write("model:")) == [
        "r.yaml:1 | model | null | expected a mapping with the keys activation, count, last, layers, pair, table"
    ]
    assert problems(write("model: 3"))[0].startswith("r.yaml:1 | model | 3 | expected a mapping with the keys")


def test_a_check_of_the_whole(write):
    assert problems(write("steps: 13")) == ["r.yaml:1 |  |  | 13 steps bring bad luck; use 14"]


def test_message_for_people(write):
    with pytest.raises(load.ConfigError) as caught:
        load.load(write("stepz: 3\nlr: x"), cls=Recipe)
    assert str(caught.value).splitlines() == [
        "2 problems in r.yaml",
        "r.yaml:1: stepz = 3",
        "    unknown key; did you mean `steps`? (allowed: flag, lr, model, name, out, steps)",
        'r.yaml:2: lr = "x"',
        "    expected a number",
    ]


def test_overrides(write):
    name = write("model:\n  layers:\n    - {kind: window, width: 1}\n    - {kind: window, width: 2}\n")
    overrides = [
        "model.layers.1.width=5",
        "model.last={kind: sparse, ratio: 1e-3}",
        "model.last.top_k=7",
        "lr=3e-4",
        "name='a=b'",
        "model.pair=[7, 8]",
        "out=",
        "steps=1",
        "steps=2",
    ]
    config = load.load(name, cls=Recipe, overrides=overrides).config
    assert [layer.width for layer in config.model.layers] == [1, 5]
    assert config.model.last == Sparse(kind="sparse", top_k=7, ratio=1e-3)
    assert (config.lr, config.name, config.model.pair, config.out, config.steps) == (3e-4, "a=b", (7, 8), None, 2)


def test_wrong_overrides_are_all_reported(write):
    name = write("model:\n  layers:\n    - {kind: window, width: 1}\nlr: 1\n")
    overrides = ["model.layers.1.width=5", "model.layers.x=5", "lr.a=3", "steps", "=3", "a..b=1", "lr=[", "flagg=true", "name={a: 1, a: 2}"]
    assert problems(name, *overrides) == [
        "--set model.layers.1.width=5 | model.layers.1.width |  | '1' is not an index of this list of 1 (allowed: 0 to 0)",
        "--set model.layers.x=5 | model.layers.x |  | 'x' is not an index of this list of 1 (allowed: 0 to 0)",
        "--set lr.a=3 | lr.a |  | 1 (r.yaml:4) is neither a mapping nor a list, so it has no 'a'",
        "--set steps |  |  | expected the form path.to.key=value",
        "--set =3 |  |  | expected the form path.to.key=value",
        "--set a..b=1 |  |  | expected the form path.to.key=value",
        "--set lr=[:1:2 |  |  | bad YAML: while parsing a flow node expected the node content, but found '<stream end>'",
        "--set name={a: 1, a: 2} | a |  | duplicate key: it is already given at --set name={a: 1, a: 2}; keep one of the two",
        "--set name={a: 1, a: 2} | name | a mapping with the keys a | expected a string",
        "--set flagg=true | flagg | true | unknown key; did you mean `flag`? (allowed: flag, lr, model, name, out, steps)",
    ]
