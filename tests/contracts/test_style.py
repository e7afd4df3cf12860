"""The countable part of the project's style (docs: architecture, section 6): sizes, names, docstrings, no paths of somebody's machine."""

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

PROJECT = pathlib.Path(__file__).parents[2]

LINES, LINES_OF_KERNELS = 500, 600
FUNCTION, FUNCTION_OF_KERNELS = 60, 150
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc"}
TEXTS = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".sh", ".cfg", ".json", ""}
FOLDERS = ("src", "tests", "configs", "scripts", "docs", ".ci")
MACHINE_PATH = re.compile(r"(?<![\w.$)}\]-])/(?:home|root|Users|work|tmp)/|(?<![\w.$)}\]-])/(?:tmp|root)\b(?!/)")


def python_files(project: pathlib.Path) -> Iterator[pathlib.Path]:
    """Our Python files, without caches."""
    for folder in ("src", "tests", "scripts"):
        yield from sorted((project / folder).rglob("*.py"))


def _is_kernel(path: pathlib.Path) -> bool:
    return "kernels" in path.parts


def long_files(project: pathlib.Path) -> list[str]:
    """Files with too many lines."""
    wrong = []
    for path in python_files(project):
        count, limit = len(path.read_text(encoding="utf-8").splitlines()), LINES_OF_KERNELS if _is_kernel(path) else LINES
        if count > limit:
            wrong.append(f"{path}:{limit + 1}: {count} lines, at most {limit}: split it by idea")
    return wrong


def long_functions(project: pathlib.Path) -> list[str]:
    """Functions with too many lines, not counting the docstring: a lecture may be as long as it has to be."""
    wrong = []
    for path in python_files(project):
        limit = FUNCTION_OF_KERNELS if _is_kernel(path) else FUNCTION
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            count = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                count -= node.body[0].end_lineno - node.body[0].lineno + 1
            if count > limit:
                wrong.append(f"{path}:{node.lineno}: {node.name} has {count} lines, at most {limit}")
    return wrong


def vague_names(project: pathlib.Path) -> list[str]:
    """Modules and folders whose name says nothing."""
    wrong = []
    for path in python_files(project):
        parts = set(path.relative_to(project).with_suffix("").parts)
        words = {word for part in parts for word in part.split("_")}
        if VAGUE & words:
            wrong.append(f"{path}:1: {', '.join(sorted(VAGUE & words))}: name it after what it is about")
    return wrong


def machine_paths(project: pathlib.Path) -> list[str]:
    """Lines that name a folder of one person's machine."""
    files = [path for folder in FOLDERS for path in sorted((project / folder).rglob("*")) if path.suffix in TEXTS]
    here = (path for path in sorted(project.iterdir()) if path.name != ".git")  # in a git worktree that is a file, and names its place
    files += [path for path in here if path.suffix in TEXTS]
    wrong = []
    for path in files:
        if not path.is_file() or "__pycache__" in path.parts or any(part.endswith(".egg-info") for part in path.parts):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if MACHINE_PATH.search(line):
                wrong.append(f"{path}:{number}: a path of one machine: {line.strip()}")
    return wrong


def silent_names(project: pathlib.Path) -> list[str]:
    """Modules, and public functions and classes at the top of a module in ``src``, without a docstring."""
    wrong = []
    for path in sorted((project / "src").rglob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(module):
            wrong.append(f"{path}:1: the module has no docstring")
        for node in module.body:
            public = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                wrong.append(f"{path}:{node.lineno}: {node.name} has no docstring")
    return wrong


RULES = (long_files, long_functions, vague_names, machine_paths, silent_names)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_project_keeps_the_rule(rule):
    wrong = rule(PROJECT)
    assert not wrong, "\n" + "\n".join(wrong)


def body(lines: int, docstring: int = 0) -> str:
    doc = ['    """Says.', *["    more"] * (docstring - 2), '    """'] if docstring else []
    return "\n".join(["def f():", *doc, *["    x = 1"] * (lines - 1)])


@pytest.mark.parametrize(
    ("rule", "name", "text", "complaint"),
    [
        (long_files, "src/a.py", "x = 1\n" * 500, ""),
        (long_files, "src/a.py", "x = 1\n" * 501, "a.py:501: 501 lines, at most 500"),
        (long_files, "src/ops/kernels/a.py", "x = 1\n" * 600, ""),
        (long_files, "tests/a.py", "x = 1\n" * 501, "a.py:501"),
        (long_functions, "src/a.py", body(60), ""),
        (long_functions, "src/a.py", body(60, docstring=30), ""),
        (long_functions, "src/a.py", "\n" + body(61), "a.py:2: f has 61 lines, at most 60"),
        (long_functions, "src/ops/kernels/a.py", body(150), ""),
        (long_functions, "src/ops/kernels/a.py", body(151), "f has 151 lines, at most 150"),
        (vague_names, "src/ops/norm.py", "", ""),
        (vague_names, "src/ops/utils.py", "", "utils: name it after what it is about"),
        (vague_names, "src/common/norm.py", "", "common: name it"),
        (vague_names, "src/data_helpers.py", "", "helpers: name it"),
        (machine_paths, "docs/a.md", "see https://a.b/home/x and $(HOME)/tmp/x, runs/tmp/x", ""),
        (machine_paths, "docs/a.md", "x\nopen /" + "home/ann/data", "a.md:2: a path of one machine: open /" + "home/ann/data"),
        (machine_paths, "configs/a.yaml", "out: /" + "tmp/run", "a.yaml:1"),
        (machine_paths, "Makefile", "a:\n\tcd /" + "root && b", "Makefile:2"),
        (silent_names, "src/a.py", '"""A."""\nclass _B: pass\ndef c():\n    """C."""\n', ""),
        (silent_names, "src/a.py", '"""A."""\nclass B: pass\n', "a.py:2: B has no docstring"),
        (silent_names, "src/a.py", "x = 1", "a.py:1: the module has no docstring"),
    ],
)
def test_the_rule_bites(tmp_path, rule, name, text, complaint):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    wrong = rule(tmp_path)
    assert len(wrong) == bool(complaint), wrong
    assert complaint in "".join(wrong)
