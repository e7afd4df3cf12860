"""Taking a tree apart by its declarations, and putting it together again."""

import numpy as np
import pytest

from v4train.core import param, tree


def declaration(**options) -> param.Declaration:
    return param.Declaration(shape=(2, 3), axes=("embed", "ffn"), init=param.Constant(0.0), **options)


DECLARED = {
    "a": {"w": declaration(), "bias": declaration(group="buffer"), "inner": {"norm": declaration(group="adamw")}},
    "only_buffers": {"table": declaration(group="buffer")},
    "head": declaration(group="adamw"),
}
VALUES = {"a": {"w": 1, "bias": 2, "inner": {"norm": 3}}, "only_buffers": {"table": 4}, "head": 5}


def test_select_keeps_what_is_asked_for_and_prunes_empty_branches():
    trained = tree.select(VALUES, declarations=DECLARED, keep=lambda d: d.trained)
    assert trained == {"a": {"w": 1, "inner": {"norm": 3}}, "head": 5}
    assert tree.select(VALUES, declarations=DECLARED, keep=lambda d: d.group == "muon") == {"a": {"w": 1}}
    assert tree.select(VALUES, declarations=DECLARED, keep=lambda d: False) == {}


def test_select_works_on_the_declarations_themselves():
    buffers = tree.select(DECLARED, declarations=DECLARED, keep=lambda d: not d.trained)
    assert list(param.flatten(buffers)) == ["a/bias", "only_buffers/table"]
    assert all(d.group == "buffer" for d in param.flatten(buffers).values())


def test_merge_undoes_select_in_either_order():
    trained = tree.select(VALUES, declarations=DECLARED, keep=lambda d: d.trained)
    buffers = tree.select(VALUES, declarations=DECLARED, keep=lambda d: not d.trained)
    assert tree.merge(trained, buffers) == tree.merge(buffers, trained) == VALUES


def test_merge_sorts_the_keys_so_that_trees_compare_and_flatten_alike():
    merged = tree.merge({"b": {"z": 1}, "c": 2}, {"b": {"a": 3}, "a": 4})
    assert list(merged) == ["a", "b", "c"]
    assert list(merged["b"]) == ["a", "z"]


def test_merge_leaves_its_inputs_alone():
    first, second = {"a": {"x": 1}}, {"a": {"y": 2}}
    tree.merge(first, second)
    assert (first, second) == ({"a": {"x": 1}}, {"a": {"y": 2}})


@pytest.mark.parametrize(("first", "second"), [({"a": 1}, {"a": 2}), ({"a": 1}, {"a": {"b": 2}}), ({"a": {"b": 1}}, {"a": {"b": 2}})])
def test_merge_refuses_a_leaf_that_both_have(first, second):
    with pytest.raises(AssertionError, match="both parts have"):
        tree.merge(first, second)


def test_arrays_pass_through_unchanged():
    array = np.arange(6)
    assert tree.select({"w": array}, declarations={"w": declaration()}, keep=lambda d: True)["w"] is array
