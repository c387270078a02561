"""Units and exact means, against distributions and samples whose figures are known."""

import math

import numpy as np
import pytest

from bitsperdim import likelihood
from bitsperdim.likelihood import Means


@pytest.mark.parametrize(("levels", "bits"), [(256, 8.0), (32, 5.0), (2, 1.0), (17, 4.087462841250339)])
def test_uniform_noise_costs_log2_of_its_levels_in_every_dimension(levels, bits):
    num_dims = 32 * 32 * 3
    assert likelihood.bits_per_dim(num_dims * math.log(levels), num_dims) == pytest.approx(bits, rel=1e-12)


def test_a_coin_is_worth_one_bit():
    assert likelihood.nats_to_bits(-math.log(0.5)) == pytest.approx(1.0, rel=1e-15)


def batches(values, batch_size):
    """As an evaluation sees them: the last batch is filled up with something that must not count."""
    for start in range(0, len(values), batch_size):
        rows = values[start : start + batch_size]
        padding = np.full(batch_size - len(rows), np.nan)
        yield {"nats": np.concatenate([rows, padding])}, np.arange(batch_size) < len(rows)


@pytest.mark.parametrize("batch_size", [1, 7, 32, 100, 1000])
def test_padding_never_counts_whatever_the_batch(batch_size):
    values = np.random.default_rng(0).gamma(2.0, 50.0, 100)
    means = Means()
    for parts, mask in batches(values, batch_size):
        means.add(parts, mask)
    assert means.count == 100
    assert means.means()["nats"] == pytest.approx(values.mean(), rel=1e-14)
    assert means.standard_error("nats") == pytest.approx(values.std(ddof=1) / 10.0, rel=1e-12)


def test_standard_error_of_four_numbers_by_hand():
    # Deviations -1.5, -0.5, 0.5, 1.5: s^2 = 5 / 3, divided by n = 4.
    means = Means()
    means.add({"nats": np.array([1.0, 2.0, 3.0, 4.0])}, np.ones(4, bool))
    assert means.standard_error("nats") == pytest.approx(math.sqrt(5 / 12), rel=1e-15)


def test_standard_error_is_the_spread_over_other_test_sets():
    draws = np.random.default_rng(1).normal(0.0, 3.0, (2000, 50))
    reported = []
    for test_set in draws:
        means = Means()
        means.add({"nats": test_set}, np.ones(50, bool))
        reported.append(means.standard_error("nats"))
    assert np.sqrt(np.mean(np.square(reported))) == pytest.approx(draws.mean(1).std(), rel=0.05)


def test_one_image_has_no_standard_error():
    means = Means()
    means.add({"nats": np.array([5.0])}, np.array([True]))
    assert math.isnan(means.standard_error("nats"))


def test_float32_parts_are_summed_in_double():
    # In float32, 2^24 + 1 is 2^24: adding ones to a sum of this size loses all of them.
    means = Means()
    means.add({"nats": np.float32([2.0**24])}, np.array([True]))
    for _ in range(3):
        means.add({"nats": np.ones(1, np.float32)}, np.array([True]))
    assert means.means()["nats"] == (2**24 + 3) / 4
