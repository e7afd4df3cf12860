"""``v4train plan``: tables that a terminal shows, JSON that programs read, and messages for mistakes."""

import json
import re

import pytest

from tests.plan import test_stages
from v4train.cli import main, plan_text
from v4train.plan import estimate, machine, search


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = main.main(["plan", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_trillion_recipe_as_json(capsys):
    code, out, _ = run(capsys, "configs/v4_1t.yaml", "--chips", "H200x512", "--json", "--price", "3")
    found = json.loads(out)
    assert code == 0
    assert found["parameters_total"] == 997_431_773_463
    assert found["parameters_active"] == 31_940_435_223
    assert sum(found["parameters_by_kind"].values()) == found["parameters_total"]
    assert found["fits"]
    assert found["remedy"] is None
    phase = found["phases"][0]
    assert phase["bytes_total"] == found["bytes_total"] == pytest.approx(sum(phase["bytes_by_cause"].values()), abs=20)
    assert phase["bytes_total"] <= found["machine"]["usable_bytes"] < found["machine"]["memory_bytes"] == 141e9
    assert phase["flops_per_token_total"] == pytest.approx(238e9, rel=0.01)
    cost = found["cost"]
    assert cost["dollars"] == pytest.approx(3 * cost["chip_hours"])
    assert cost["days"] == pytest.approx(cost["chip_hours"] / 512 / 24)
    # The same bill from MFU: tokens x FLOPs / (peak x MFU).
    hours = cost["tokens"] * phase["flops_per_token_total"] / (phase["mfu"] * 989e12) / 3600
    assert hours == pytest.approx(cost["chip_hours"], rel=1e-6)


def test_tables_fit_into_100_columns_and_say_the_same(capsys):
    code, out, _ = run(capsys, "configs/v4_1t.yaml", "--chips", "H200x512", "--tokens", "1e12")
    assert code == 0
    assert max(len(line) for line in out.splitlines()) <= 100
    for words in (
        "v4_1t on 512 x H200",
        "997.4B",
        "31.94B",
        "mHC streams",
        "all-to-all",
        "MFU",
        "DeepSeek-V3, published",
        "2.788M",
        "fits",
    ):
        assert words in out, words
    assert "1T" in out


def test_what_does_not_fit_is_code_1_with_the_change_that_would(capsys, monkeypatch):
    """How the change is found: tests/plan/test_search.py."""
    change = search.Change(("train.microbatches=48",), total=58.9e9, step=358.0, devices=512)
    monkeypatch.setattr(search, "smallest_change", lambda recipe, *, on: change)
    code, out, _ = run(capsys, "configs/v4_1t.yaml", "--chips", "H100x512", "--set", "train.microbatches=6")
    words = " ".join(out.split())
    assert code == 1
    assert "does NOT fit" in out
    assert "too much. The largest: mHC streams kept between layers" in words
    assert "The smallest change that fits: --set train.microbatches=48: 58.9 GB, 358.0 s a step." in words
    assert max(len(line) for line in out.splitlines()) <= 100


def test_meshes_are_ranked(capsys):
    code, out, _ = run(capsys, "configs/tiny.yaml", "--chips", "L4x8", "--search", "--top", "3")
    assert code == 0
    assert out.count(" fits") == 3 + 1  # the title, too
    assert re.search(r"the first: (--set mesh\.\w+=\d+ ?)+", out)
    assert max(len(line) for line in out.splitlines()) <= 100


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "name the machine: --chips"),
        (("--chips", "H201x512"), "no chip 'H201'"),
        (("--chips", "H200"), "write it like H200x512"),
        (("--chips", "H200x1024"), r"for 512 devices, but --chips has 1,024; .*--set mesh.replica=2"),
        (("--chips", "H200x100"), r"for 512 devices, but --chips has 100; name as many with --chips, or let --search find a mesh \("),
        (("--compile", "--target", "H100:8x8"), r"but --target has 64; name as many with --target, or let"),
        (("--chips", "v5p:8x8x8:2", "--set", "mesh.fsdp=4", "--set", "train.microbatches=24"), "only mesh.replica goes across them"),
        (("--chips", "H200x512", "--price", "-1"), "--price -1.0 must be"),
        (("--chips", "H200x512", "--tokens", "0"), "--tokens 0.0 must be"),
        (("--chips", "H200x512", "--search", "--top", "0"), "--top 0 must be"),
        (("--chips", "H200x512", "--compile"), "--compile needs --target"),
        (("--chips", "H200x512", "--search", "--compile", "--target", "H200:64x8"), "--search ranks meshes .* use one of them"),
        (("--chips", "H200x512", "--compile", "--target", "H100:64x8"), "are different machines"),
        (("--chips", "H200x512", "--compile", "--target", "H200:32x8"), "are different machines"),
        (("--chips", "H200x512", "--set", "train.batch_rows=5"), "train.batch_rows 5 must be a multiple"),
    ],
)
def test_mistakes_are_named_with_a_remedy(capsys, words, complaint):
    code, out, err = run(capsys, "configs/v4_1t.yaml", *words)
    assert (code, out) == (2, "")
    assert re.search(complaint, " ".join(err.split())), err


def test_a_run_of_several_parts_begins_with_a_table_of_them_and_ends_with_what_was_assumed(capsys):
    recipe = test_stages.course()
    recipe = recipe.model_copy(update={"numerics": recipe.numerics.model_copy(update={"compute": "bfloat16", "experts": "fp8"})})
    plan = estimate.estimate(recipe, on=machine.parse("H100x8"))
    plan_text.show(plan, remedy=None)
    out = capsys.readouterr().out
    rows = [line.split() for line in out.partition("The course of the run")[2].partition("Memory")[0].splitlines()]
    assert [row[:4] for row in rows if len(row) == 9 and row[0] == "16"] == [
        ["16", "256", "dense", "4"],
        ["16", "512", "warmup", "2"],
        ["16", "512", "sparse", "3"],
    ]
    days = sum(phase.steps * phase.timing.step for phase in plan.phases) / 86_400
    assert plan.bill.days == pytest.approx(days)
    assert ["9", "57.34K", f"{days:,.1f}"] in rows
    assert "Low precision: routed experts in FP8 by kernels that were never run" in out
