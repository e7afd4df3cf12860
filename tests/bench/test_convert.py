"""The bench of conversions: what it makes is a checkpoint, what it says adds up, what it cannot do it refuses."""

import json

import pytest
import yaml

from tests.interop import steps
from v4train.bench import convert
from v4train.cli import main
from v4train.interop import names
from v4train.interop import released as released_lib


def model():
    made = steps.recipe().model
    return made.model_copy(update={"layers": (made.layers[0].model_copy(update={"pattern": ("window", "csa", "hca"), "repeat": 2}),)})


def test_the_size_is_reached_with_as_few_experts_as_do():
    full = model().model_copy(update={"moe": model().moe.model_copy(update={"experts": 64})})
    short = convert.shortened(full, gigabytes=0.002)
    assert short.layer_kinds == ("window", "csa", "hca")
    assert short.moe.hash_layers == 1
    size = convert._bytes(short)
    fewer = short.model_copy(update={"moe": short.moe.model_copy(update={"experts": short.moe.experts - 1})})
    assert convert._bytes(fewer) < 2e6 <= size
    assert convert.shortened(full, gigabytes=0.0).moe.experts == full.moe.top_k


def test_what_it_makes_is_read_as_a_checkpoint_of_that_model(tmp_path):
    short = convert.shortened(model(), gigabytes=0.0)
    size = convert.make(tmp_path / "made", model=short)
    released = released_lib.Released.open(tmp_path / "made")
    assert {slot.released for slot in names.slots(short)} == set(released.sources)
    assert released.verify() == 2
    tensor_bytes = sum(info.nbytes for files in (released.files, released.extras) for info in files.table.values())
    assert size == tensor_bytes == convert._bytes(short)
    embedding = released.files.read("embed.weight").astype("float32")
    assert 2**-7 <= abs(embedding).min() <= abs(embedding).max() < 2**-5
    assert len({x.tobytes() for x in embedding}) == short.vocab_size


def test_refusals(tmp_path, capsys):
    with pytest.raises(ValueError, match="no window layers; name one like configs/v4_flash"):
        convert.shortened(steps.recipe().model, gigabytes=1.0)
    with pytest.raises(ValueError, match="--gb 9: 3 layers with all 8 experts are smaller"):
        convert.shortened(model(), gigabytes=9)


@pytest.mark.slow  # three processes
def test_a_round_trip_in_processes(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(steps.recipe().model_copy(update={"model": model()}).model_dump(mode="json")))
    assert main.main(["bench", "convert", "--config", str(recipe), "--gb", "0", "--directory", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["identical_after_round_trip"] is True
    assert [c["what"] for c in result["conversions"]] == ["import", "export bf16", "export fp4-fp8"]
    for c in result["conversions"]:
        assert c["megabytes_per_second"] == pytest.approx(result["source_bytes"] / 1e6 / c["seconds"], rel=0.1, abs=0.1)
        assert 5e7 < c["peak_resident_bytes"] < 2e9
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    table = convert.table(result)
    assert "equals the source bit for bit" in table
    assert "NOT bit for bit" in convert.table(result | {"identical_after_round_trip": False})
