"""Meshes are enumerated whole, ranked by what fits and is fast, and what does not fit is helped by the smallest change."""

import dataclasses
import math

import pytest

from tests.plan import small
from v4train import recipe as recipe_lib
from v4train.core import hardware
from v4train.plan import estimate, machine, search


def with_memory(gigabytes: float, *, devices: int = 8) -> machine.Machine:
    """H100s with less memory."""
    chip = dataclasses.replace(hardware.CHIPS["H100"], hbm_bytes=round(gigabytes * 1e9))
    return machine.Machine("H100", chip, devices)


@pytest.mark.parametrize(("devices", "count"), [(1, 1), (2, 5), (8, 35), (12, 75)])
def test_all_ways_to_divide_the_devices(devices, count):
    """p^k has C(k + 4, 4) ordered factorisations into 5; 12 = 2^2 x 3 has 15 x 5."""
    found = list(search.meshes(devices, slices=1))
    assert len(found) == count == len({tuple(sizes.values()) for sizes in found})
    assert all(math.prod(sizes.values()) == devices for sizes in found)


def test_slices_are_copies():
    assert {sizes["replica"] for sizes in search.meshes(8, slices=2)} == {2, 4, 8}


def test_ranking_puts_what_fits_first_and_the_fastest_of_it():
    found = search.ranked(small.recipe(), on=with_memory(0.02), top=50)
    fits = [one.fits for one in found]
    assert fits == sorted(fits, reverse=True)
    steps = [one.phase.timing.step for one in found if one.fits]
    assert steps == sorted(steps)
    lacking = [one.phase.memory.total for one in found if not one.fits]
    assert lacking == sorted(lacking), "what does not fit is ranked by how much it lacks, however fast it would be"
    assert True in fits
    assert len(lacking) > 1
    for one in found:
        assert one.recipe.mesh.devices == 8
        assert not [check(one.recipe) for check in recipe_lib.CHECKS if check(one.recipe)]
        assert one.fits == (one.total <= 0.95 * 0.02e9)


def test_no_more_microbatches_than_are_needed():
    roomy = search.ranked(small.recipe(), on=with_memory(80), top=50)
    assert {one.recipe.train.microbatches for one in roomy} == {1}


def test_a_number_of_chips_that_nothing_divides_is_refused():
    with pytest.raises(ValueError, match=r"no mesh of 11 devices suits the recipe: its 16 rows, 8 experts"):
        search.ranked(small.recipe(), on=with_memory(80, devices=11))


def test_the_smallest_change_fits_and_is_one_setting_where_one_is_enough():
    recipe = small.recipe(train={"microbatches": 1})
    total = estimate.estimate(recipe, on=with_memory(80)).worst.memory.total
    on = with_memory(0.8 * total / 0.95 / 1e9)
    change = search.smallest_change(recipe, on=on)
    assert change is not None
    assert len(change.settings) == 1
    path, _, value = change.settings[0].partition("=")
    changed = search.changed(recipe, {path: int(value) if value.isdigit() else value})
    assert changed is not None
    assert estimate.estimate(changed, on=on).worst.memory.total <= on.usable_bytes
    assert change.total <= on.usable_bytes


def test_a_change_that_the_recipes_checks_refuse_is_none():
    assert search.changed(small.recipe(), {"train.microbatches": 7}) is None, "does not divide 16 rows"
    assert search.changed(small.recipe(), {"train.microbatches": 1}) is not None


def test_more_chips_are_asked_for_only_if_nothing_else_helps():
    """A bit less than what the best mesh of 8 needs with all that settings can do: the state must be split further."""
    recipe = small.recipe(mesh={"fsdp": 1, "context": 8}, train={"batch_rows": 2, "microbatches": 2})
    least = search.ranked(recipe, on=with_memory(1e-5), top=1)[0].phase.memory.total
    on = with_memory(0.9 * least / 0.95 / 1e9)
    change = search.smallest_change(recipe, on=on)
    assert change is not None
    assert change.devices > 8
    [setting] = change.settings
    axis, _, size = setting.partition("=")
    larger = search.changed(recipe, {axis: int(size)})
    assert larger is not None
    assert larger.mesh.devices == change.devices
    assert estimate.estimate(larger, on=dataclasses.replace(on, devices=change.devices)).fits


def test_a_model_that_no_number_of_chips_holds():
    assert search.smallest_change(small.recipe(), on=with_memory(1e-5)) is None
