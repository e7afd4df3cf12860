"""From logical axes to partitions: every mesh axis once, and nothing split that does not divide."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from tests.model import small
from v4train.core import axes as axes_lib
from v4train.core import param
from v4train.sharding import rules


def mesh(**sizes: int) -> jax.sharding.AbstractMesh:
    """A mesh without devices: rules need only its sizes."""
    names = ("replica", "fsdp", "expert", "context", "tensor")
    return jax.sharding.AbstractMesh(tuple(sizes.get(name, 1) for name in names), names)


def spec(letters: str, *, shape: tuple[int, ...] | None = None, **sizes: int) -> P:
    return rules.spec(axes_lib.logical_axes(letters), shape=shape, mesh=mesh(**sizes))


@pytest.mark.parametrize(
    ("letters", "sizes", "expected"),
    [
        ("B S D", {"fsdp": 8}, P(("fsdp",), None, None)),  # the batch has used fsdp up
        ("D F", {"fsdp": 8}, P(("fsdp",), None)),
        ("D F", {"fsdp": 4, "tensor": 2}, P(("fsdp",), ("tensor",))),
        ("R H", {"fsdp": 4, "tensor": 2}, P(("fsdp",), ("tensor",))),
        ("E D F", {"fsdp": 2, "expert": 4}, P(("expert",), ("fsdp",), None)),
        ("B S D", {"replica": 2, "fsdp": 2, "expert": 2}, P(("replica", "fsdp", "expert"), None, None)),
        ("B S D", {"fsdp": 2, "context": 4}, P(("fsdp",), ("context",), None)),
        ("V D", {"fsdp": 4, "tensor": 2}, P(("tensor",), ("fsdp",))),
        ("D D", {"fsdp": 4}, P(("fsdp",), None)),
        ("_ D", {"fsdp": 4}, P(None, ("fsdp",))),
        ("D", {"replica": 8}, P(None)),
        ("X _ _", {"replica": 2, "fsdp": 4}, P(("replica", "fsdp"), None, None)),
    ],
)
def test_each_mesh_axis_is_used_once_by_the_first_that_asks(letters, sizes, expected):
    assert spec(letters, **sizes) == expected


def test_what_does_not_divide_stays_whole_and_leaves_the_mesh_axis_to_others():
    assert spec("D F", shape=(6, 32), fsdp=4, tensor=2) == P(None, ("tensor",))
    assert spec("D D", shape=(6, 32), fsdp=4) == P(None, ("fsdp",))
    assert spec("B S D", shape=(6, 64, 32), fsdp=2, expert=2) == P(None, None, ("fsdp",)), "6 rows do not divide over 4 devices"
    assert spec("B S D", shape=(8, 63, 32), fsdp=2, context=2) == P(("fsdp",), None, None)


def names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one dimension."""
    return (part,) if isinstance(part, str) else part or ()


@pytest.fixture(scope="module")
def declared():
    return param.flatten(small.declarations(small.config()))


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"expert": 8}, {"fsdp": 2, "expert": 4}, {"tensor": 2, "fsdp": 4}, {"context": 8}], ids=str)
def test_every_parameter_of_the_model_has_a_partition_that_divides(declared, sizes):
    there = mesh(**sizes)
    for path, d in declared.items():
        parts = rules.spec(d.axes, shape=d.shape, mesh=there)
        used = [name for part in parts for name in names(part)]
        assert len(used) == len(set(used)), path
        for size, part in zip(d.shape, parts, strict=True):
            shards = 1
            for name in names(part):
                shards *= there.shape[name]
            assert size % shards == 0, path
        if d.axes[0] == "layers":
            assert parts[0] is None, f"{path}: a scan slices this axis"


def test_tables_of_4_rows_on_8_devices_stay_whole(declared):
    ape = next(d for path, d in declared.items() if path.endswith("attention/compressor/ape") and d.shape[1] == 4)
    assert rules.spec(ape.axes, shape=ape.shape, mesh=mesh(fsdp=8)) == P(None, None, None)


def test_large_parameters_are_split_over_fsdp(declared):
    """Else memory would not shrink with devices."""
    there = mesh(fsdp=8)
    whole = {path for path, d in declared.items() if d.trained and not any(rules.spec(d.axes, shape=d.shape, mesh=there))}
    assert {path for path in whole if declared[path].group == "muon"} == {"embedding/image/up"}
    assert all(declared[path].size <= 128 for path in whole if path != "embedding/image/up")


def test_every_rule_names_a_logical_axis():
    assert set(rules.RULES) <= set(axes_lib.LETTERS.values())
