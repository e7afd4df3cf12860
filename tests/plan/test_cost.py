"""Days and dollars, and DeepSeek-V3's published bill by the same formula."""

import pytest

from v4train.plan import cost


def test_the_formula_by_hand():
    hours = cost.chip_hours(tokens=3600e12, flops_per_token=1e9, peak=1e15, mfu=0.5)
    assert hours == pytest.approx(2e6)
    bill = cost.bill(tokens=3600e12, hours=hours, chips=1000, price=2)
    assert (bill.days, bill.dollars) == (pytest.approx(2000 / 24), pytest.approx(4e6))


def test_deepseek_v3_has_the_published_number_of_active_parameters():
    assert cost.Peer().matrices == pytest.approx(37e9 - 129_280 * 7168 / 2, rel=0.01), "37B active, between with and without the embedding"


def test_our_count_of_its_flops_is_the_one_that_its_measured_speed_implies():
    """272.8B tokens a day on 2,048 chips at 385 TFLOP/s each (arXiv 2505.09343, table 4)."""
    implied = 385e12 * 2048 * 86_400 / 272.8e9
    assert cost.Peer().training_flops(length=4096) == pytest.approx(implied, rel=0.01)


def test_our_count_of_its_flops_is_its_authors():
    """250 GFLOP a token (arXiv 2505.09343, table 2), in three digits."""
    assert cost.Peer().training_flops(length=4096) == pytest.approx(250e9, rel=0.005)


def test_the_published_bill_within_10_percent():
    stages = cost.v3_hours()
    pre_training = stages[0]
    assert pre_training[1] == pytest.approx(pre_training[0].published_hours, rel=0.1)
    assert pre_training[1] == pytest.approx(2.664e6, rel=0.01), "it is far better than that"
    total = sum(hours for _, hours in stages) + cost.V3_POST_TRAINING_HOURS
    assert total == pytest.approx(2.788e6, rel=0.1)
    assert cost.bill(tokens=14.8e12, hours=total, chips=2048, price=2).dollars == pytest.approx(5.576e6, rel=0.1)


def test_180_thousand_hours_for_a_trillion_tokens():
    peer = cost.Peer()
    hours = cost.chip_hours(tokens=1e12, flops_per_token=peer.training_flops(length=4096), peak=989e12, mfu=cost.V3_MFU)
    assert hours == pytest.approx(180_000, rel=0.01)
    assert hours / 2048 / 24 == pytest.approx(3.7, rel=0.01)
