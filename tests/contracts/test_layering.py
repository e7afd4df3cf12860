"""Imports go down the layers (docs: architecture, section 2): nothing climbs, equal layers are strangers, configs load without JAX.

The rules are functions from a source folder to a list of ``file:line: what is wrong``. They run over the project, and over small
made-up projects that break each rule, so that a rule that no longer bites is noticed.
"""

import ast
import dataclasses
import pathlib
from collections.abc import Iterator

import pytest

SRC = pathlib.Path(__file__).parents[2] / "src"
ROOT = "v4train"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("core", "config"),
    ("sharding", "numerics"),
    ("ops",),
    ("model", "data", "optim", "checkpoint"),
    ("interop",),
    ("recipe",),
    ("train", "decode", "plan"),
    ("cli", "serve", "bench"),
)
"""Lowest first. An import goes from a layer to a lower one, or stays inside its package."""
LEVEL = {package: level for level, layer in enumerate(LAYERS) for package in layer}
ONLY = {"interop": {"model", "checkpoint", "ops", "numerics", "core", "config"}}
"""Packages that may import less than what lies below them."""
STARTS_JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
"""Packages from outside that import JAX."""


@dataclasses.dataclass(frozen=True)
class Import:
    """One imported module, by its full dotted name. ``always``: at the top of the file, not in a function or for the type checker only."""

    name: str
    line: int
    always: bool


@dataclasses.dataclass(frozen=True)
class Module:
    """One file of ours. ``package`` is its place in `LAYERS`."""

    name: str
    path: pathlib.Path
    tree: ast.Module

    @property
    def package(self) -> str:
        parts = self.name.split(".")
        if parts[-1] == "__main__":  # a program, which nobody imports
            return "cli"
        return parts[1] if len(parts) > 1 else ""

    @property
    def is_config(self) -> bool:
        return self.package == "config" or self.name.endswith(".config")


def modules(src: pathlib.Path) -> dict[str, Module]:
    """Every file below ``src/v4train`` by its module name."""
    found = {}
    for path in sorted((src / ROOT).rglob("*.py")):
        parts = path.relative_to(src).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Module(name, path, ast.parse(path.read_text(encoding="utf-8")))
    return found


def imports(module: Module, known: dict[str, Module]) -> Iterator[Import]:
    """What a module imports. ``from a import b`` is an import of ``a.b`` where that is a module, else of ``a``."""
    for node, always in statements(module.tree.body, True):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, always)
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                is_package = module.path.name == "__init__.py"
                above = module.name.split(".")[: len(module.name.split(".")) + is_package - node.level]
                start = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{start}.{alias.name}"
                yield Import(inner if inner in known or start == ROOT else start, node.lineno, always)


def statements(body: list[ast.stmt], always: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, with whether it runs when the module is imported."""
    for statement in body:
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            yield from ((node, False) for part in statement.body for node in ast.walk(part))
            yield from statements(statement.orelse, always)
        elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from ((node, False) for node in ast.walk(statement))
        else:
            yield statement, always
            for field in ("body", "orelse", "finalbody"):
                yield from statements(getattr(statement, field, []), always)
            for handler in getattr(statement, "handlers", []):
                yield from statements(handler.body, always)


def climbing_imports(src: pathlib.Path) -> list[str]:
    """Imports that go up, across, or where `ONLY` does not allow them."""
    known = modules(src)
    wrong = []
    for module in known.values():
        if not module.package:
            continue
        if module.package not in LEVEL:
            wrong.append(f"{module.path}:1: {module.package!r} is in no layer; give it one in the architecture and in LAYERS")
            continue
        for item in imports(module, known):
            parts = item.name.split(".")
            if parts[0] != ROOT or len(parts) < 2 or parts[1] == module.package:
                continue
            reason = refusal(module, known.get(item.name), parts[1])
            if reason:
                wrong.append(f"{module.path}:{item.line}: {module.package} imports {item.name}: {reason}")
    return wrong


def refusal(module: Module, target: Module | None, package: str) -> str:
    """Why ``module`` must not import from ``package``, or an empty string."""
    own = module.package
    if package not in LEVEL:
        return f"{package!r} is in no layer"
    if own == "recipe":
        return "" if target and target.is_config else "the recipe imports only config.py files and v4train.config"
    if LEVEL[package] > LEVEL[own]:
        return f"{package} lies above {own}"
    if LEVEL[package] == LEVEL[own]:
        return f"{package} and {own} are of the same layer"
    if own in ONLY and package not in ONLY[own]:
        return f"{own} may import {', '.join(sorted(ONLY[own]))}"
    return ""


def configs_that_start_jax(src: pathlib.Path) -> list[str]:
    """Config files, the recipe and the command line's frame, if importing them imports JAX; with the chain of imports."""
    known = modules(src)
    wrong = []
    for module in known.values():
        if module.is_config or module.name in (f"{ROOT}.recipe", f"{ROOT}.cli.main"):
            wrong += [
                f"{module.path}:{item.line}: imports {item.name}; a config must load without JAX"
                for item in imports(module, known)
                if item.name.split(".")[0] in STARTS_JAX
            ]
            wrong += [
                f"{module.path}:1: reaches JAX through {' -> '.join(chain)}" for chain in chains_to_jax(module, known, ()) if len(chain) > 2
            ]
    return wrong


def chains_to_jax(module: Module, known: dict[str, Module], seen: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Chains of imports that always happen, from ``module`` to a package that starts JAX."""
    path = (*seen, module.name)
    for item in imports(module, known):
        if not item.always:
            continue
        if item.name.split(".")[0] in STARTS_JAX:
            yield (*path, item.name)
        elif item.name in known and item.name not in path:
            yield from chains_to_jax(known[item.name], known, path)


def talkative_inits(src: pathlib.Path) -> list[str]:
    """``__init__.py`` files that hold anything but one docstring."""
    wrong = []
    for path in sorted((src / ROOT).rglob("__init__.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        if not body or not _is_text(body[0]):
            wrong.append(f"{path}:1: has no docstring")
        wrong += [f"{path}:{extra.lineno}: more than a docstring" for extra in body if not _is_text(extra)]
    return wrong


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)


RULES = (climbing_imports, configs_that_start_jax, talkative_inits)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_project_keeps_the_rule(rule):
    wrong = rule(SRC)
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_folder_is_a_package():
    folders = {path.parent for path in (SRC / ROOT).rglob("*.py")}
    bare = [f"{folder}: has no __init__.py" for folder in sorted(folders) if not (folder / "__init__.py").exists()]
    assert not bare, "\n" + "\n".join(bare)


def plant(tmp_path: pathlib.Path, files: dict[str, str]) -> pathlib.Path:
    for name, text in {"core/axes.py": "", "core/param.py": "import jax", "config/base.py": "import pydantic", **files}.items():
        path = tmp_path / ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("ops/norm.py", "from v4train.core import axes\nfrom v4train.sharding import rules", ""),
        ("model/moe.py", "from v4train.model import router\nfrom . import mlp", ""),
        ("train/step.py", "from v4train import recipe", ""),
        ("train/__main__.py", "from v4train.cli import main", ""),
        ("recipe.py", "from v4train.model import config\nfrom v4train.config import base", ""),
        ("interop/names.py", "from v4train.model import moe", ""),
        ("ops/norm.py", "import jax\nfrom v4train.model import moe", "norm.py:2: ops imports v4train.model.moe: model lies above ops"),
        ("ops/norm.py", "def f():\n    import v4train.train.loop", "norm.py:2: ops imports v4train.train.loop: train lies above ops"),
        ("ops/norm.py", "from ..data import batch", "norm.py:1: ops imports v4train.data: data lies above ops"),
        ("model/moe.py", "from v4train.data import batch", "moe.py:1: model imports v4train.data: data and model are of the same layer"),
        ("config/base.py", "from v4train.core import axes", "config imports v4train.core.axes: core and config are of the same layer"),
        ("data/mix.py", "from v4train import recipe", "data imports v4train.recipe: recipe lies above data"),
        ("recipe.py", "from v4train.model import moe", "recipe imports v4train.model.moe: the recipe imports only config.py files"),
        ("interop/names.py", "from v4train.sharding import rules", "interop may import checkpoint, config, core, model, numerics, ops"),
        ("cli/train.py", "from v4train.bench import step", "bench and cli are of the same layer"),
        ("extras/x.py", "", "x.py:1: 'extras' is in no layer"),
    ],
)
def test_the_layer_rule_bites(tmp_path, name, text, complaint):
    src = plant(tmp_path, {"model/moe.py": "", "model/config.py": "", name: text})
    wrong = climbing_imports(src)
    assert len(wrong) == bool(complaint), wrong
    assert complaint in "".join(wrong)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"model/config.py": "from v4train.config import base", "model/moe.py": "import jax"}, ""),
        ({"model/config.py": "from typing import TYPE_CHECKING\nfrom v4train.core import axes"}, ""),
        ({"model/config.py": "\nfrom jax import numpy"}, "config.py:2: imports jax; a config must load without JAX"),
        ({"config/load.py": "import jax.numpy as jnp"}, "load.py:1: imports jax.numpy"),
        ({"model/config.py": "from v4train.core import param"}, "v4train.model.config -> v4train.core.param -> jax"),
        (
            {
                "recipe.py": "from v4train.model import kinds",
                "model/kinds.py": "try:\n    from v4train.core import param\nexcept OSError: pass",
            },
            "recipe.py:1: reaches JAX through v4train.recipe -> v4train.model.kinds -> v4train.core.param -> jax",
        ),
        ({"recipe.py": "from v4train.model import kinds", "model/kinds.py": "def f():\n    from v4train.core import param"}, ""),
        ({"cli/main.py": "from v4train.cli import train", "cli/train.py": "import flax.nnx"}, "v4train.cli.train -> flax.nnx"),
    ],
)
def test_the_rule_of_configs_without_jax_bites(tmp_path, files, complaint):
    wrong = configs_that_start_jax(plant(tmp_path, files))
    assert len(wrong) == bool(complaint), wrong
    assert complaint in "".join(wrong)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('"""A package."""\n', ""),
        ("", "__init__.py:1: has no docstring"),
        ('"""A package."""\nimport os\n', "__init__.py:2: more than a docstring"),
    ],
)
def test_the_rule_of_quiet_inits_bites(tmp_path, text, complaint):
    wrong = talkative_inits(plant(tmp_path, {"ops/__init__.py": text}))
    assert len(wrong) == bool(complaint), wrong
    assert complaint in "".join(wrong)
