"""The pages do not go stale unnoticed: what they generate is up to date, and the links, paths, commands and keys they name exist.

The rules are functions from a text to a list of what is wrong, and made-up texts show that they bite.
"""

import argparse
import importlib
import importlib.util
import itertools
import pathlib
import re
import shlex

import pytest

from v4train import recipe
from v4train.cli import main
from v4train.config import load

PROJECT = pathlib.Path(__file__).parents[2]
PAGES = (
    "README.md",
    "docs/ahead_of_time.md",
    "docs/architecture.md",
    "docs/claims.md",
    "docs/cluster.md",
    "docs/data.md",
    "docs/efficiency.md",
    "docs/evaluation.md",
    "docs/generate.md",
    "docs/low_precision.md",
    "docs/open_weights.md",
    "docs/optimizer.md",
    "docs/parallelism.md",
    "docs/planner.md",
    "docs/recipe.md",
    "docs/recipe_keys.md",
    "docs/serving.md",
    "data/demo/README.md",
    "tests/golden/README.md",
)
FOLDERS = ("src", "tests", "configs", "scripts", "docs", "data/demo")
UNWRITTEN = ("data/corpus", "data/mine")
"""Paths that examples use and that a reader makes."""


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _anchors(text: str) -> set[str]:
    return {_anchor(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def broken_links(text: str, *, page: pathlib.Path) -> list[str]:
    """Relative links whose file, or whose heading in it, does not exist."""
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+://", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists():
            wrong.append(f"{target}: there is no {file}")
        elif anchor and anchor not in _anchors(text if not name else file.read_text(encoding="utf-8")):
            wrong.append(f"{target}: {file.name} has no such heading")
    return wrong


def missing_paths(text: str) -> list[str]:
    """Paths below the project's folders, in code spans and code blocks, that do not exist."""
    named = re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w", text)
    return [path for path in named if not (PROJECT / path).exists() and path not in UNWRITTEN]


def command_lines(text: str) -> list[list[str]]:
    """The words after `v4train` in the code blocks for a shell."""
    lines = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0].endswith("v4train"):
                lines.append(words[1:])
            elif words[1:3] == ["-m", "v4train.train"]:
                lines.append(["train", *words[3:]])
    return lines


def wrong_command(words: list[str]) -> str:
    """Why a command line would be refused, or ""; nothing is run, but a recipe that it trains is loaded and checked."""
    if words[0] not in main.COMMANDS:
        return f"there is no command {words[0]!r}"
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--debug", action="store_true")
    importlib.import_module(main.COMMANDS[words[0]][0]).configure(parser)
    try:
        arguments = parser.parse_args(words[1:])
        if words[0] == "train":
            recipe.resolve(str(PROJECT / (arguments.recipe or arguments.config)), overrides=arguments.overrides)
    except (argparse.ArgumentError, SystemExit, ValueError) as e:
        return str(e)
    return ""


def unknown_make_targets(text: str) -> list[str]:
    """`make` targets that the Makefile does not have."""
    known = set(re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = re.findall(r"(?:`|^)make ([\w-]+)", text, re.MULTILINE)
    return [target for target in named if target not in known]


def _pages() -> dict[str, str]:
    return {name: (PROJECT / name).read_text(encoding="utf-8") for name in PAGES}


@pytest.fixture(scope="module")
def writer():
    specification = importlib.util.spec_from_file_location("write_recipe_docs", PROJECT / "scripts" / "write_recipe_docs.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_reference_of_the_recipe_is_up_to_date(writer):
    page = writer.PAGE.read_text(encoding="utf-8")
    assert writer.updated(page) == page, "run: python scripts/write_recipe_docs.py"


def test_the_reference_has_every_key_with_a_meaning(writer):
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.*) \|$", writer.generated(), re.MULTILINE)
    resolved = recipe.resolve(str(PROJECT / "configs" / "tiny.yaml")).config.model_dump(mode="json")

    def keys(value):
        if isinstance(value, dict):
            return itertools.chain(value, *(keys(child) for child in value.values()))
        return itertools.chain(*(keys(child) for child in value)) if isinstance(value, list) else ()

    assert set(keys(resolved)) <= {name for name, *_ in rows}
    assert [name for name, *_, meaning in rows if not meaning.strip(" .")] == []


def test_a_page_without_its_marks_is_refused(writer):
    with pytest.raises(ValueError, match="lacks a line"):
        writer.updated("# The recipe file\n")


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    assert broken_links(_pages()[name], page=PROJECT / name) == []


@pytest.mark.parametrize("name", PAGES)
def test_paths_and_make_targets_exist(name):
    text = _pages()[name]
    assert (missing_paths(text), unknown_make_targets(text)) == ([], [])


@pytest.mark.parametrize("words", [words for text in _pages().values() for words in command_lines(text)], ids=" ".join)
def test_commands_are_accepted(words):
    assert wrong_command(words) == ""


def test_there_are_commands_to_check():
    assert sum(len(command_lines(text)) for text in _pages().values()) >= 6


def test_recipes_can_be_loaded_from_the_headings_of_their_files():
    """Each shipped recipe names its own command."""
    for file in sorted((PROJECT / "configs").glob("*.yaml")):
        assert f"configs/{file.name}" in file.read_text(encoding="utf-8").split("\n\n")[0]
        load.load(file, cls=recipe.Recipe)


def test_fields_of_records_and_of_the_summary_are_those_that_the_trainer_writes():
    text = _pages()["docs/recipe_keys.md"].partition("### `metrics.jsonl`")[2]
    source = "".join(file.read_text(encoding="utf-8") for file in (PROJECT / "src/v4train/train").rglob("*.py"))
    written = set(re.findall(r'"([a-z_/]+)": ', source))
    fields = [field for row in re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE) for field in re.findall(r"`([^`]+)`", row)]
    assert len(fields) > 20
    by_name = {"loss/<source>", "bpb/<source>", "modality_bpb/<modality>"}
    assert [field for field in fields if field not in written | by_name] == []


def test_the_rules_bite(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One heading\n", encoding="utf-8")
    text = (
        "# One heading\n[a](missing.md) [b](page.md#one-heading) [c](page.md#two) [d](#one-heading) [e](#three) [f](https://example.org/x)"
    )
    assert [line.partition(":")[0] for line in broken_links(text, page=page)] == ["missing.md", "page.md#two", "#three"]
    assert missing_paths("`configs/tiny.yaml`, `configs/tyni.yaml`, my/configs/other.yaml") == ["configs/tyni.yaml"]
    assert unknown_make_targets("make tiny\n`make coffee`, and make do") == ["coffee"]
    lines = command_lines(
        "```bash\n.venv/bin/v4train trian x.yaml  # no\npython -m v4train.train --config configs/tiny.yaml --sett a=1\n```"
    )
    assert [bool(wrong_command(words)) for words in lines] == [True, True]
    assert "unknown key" in wrong_command(["train", "configs/tiny.yaml", "--set", "train.stepz=1"])
    assert wrong_command(["train", "configs/tiny.yaml", "--set", "train.steps=300"]) == ""
