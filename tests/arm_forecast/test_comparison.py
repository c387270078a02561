"""The comparison of samplers: what its rows say of draws whose calls, images and seconds are known."""

import io

import jax
import numpy as np
import pytest

from arm_forecast import comparison, samplers
from arm_forecast.config import ModulesConfig
from arm_forecast.engine import Samples
from arm_forecast.pixelcnn import Grid
from arm_forecast.samplers import Sampler

GRID = Grid(8, 8, 1, 4)
ARM = samplers.Arm({}, None, ModulesConfig(), GRID)


class Doctored:
    """Takes the place of `samplers.compiled`. Images are a function of key and number alone, but for those of one
    sampler, which errs in one value of its last seed. An image takes 16 calls and a call one second for each lane."""

    def __init__(self, monkeypatch, wrong="", calls=16):
        self.wrong, self.calls, self.seconds, self.compiled = wrong, calls, 0.0, []
        monkeypatch.setattr(samplers, "compiled", self.compile)
        monkeypatch.setattr(comparison.sampler_table.time, "perf_counter", lambda: self.seconds)

    def compile(self, config, modules, grid, sampler, num_samples, batch):
        self.compiled.append((str(sampler), num_samples, batch))

        def draw(params, key, given=None):
            free = 64 if given is None else int((given < 0).sum())
            per_image = min(free, 64 if sampler.name in ("ancestral", "cached") else self.calls)
            x = np.array([jax.random.randint(jax.random.fold_in(key, i), (64,), 0, 4) for i in range(batch)])
            x = np.concatenate([x, np.zeros((num_samples - batch, 64), int)])
            if str(sampler) == self.wrong and (key == jax.random.fold_in(jax.random.key(0), 1)).all():
                x[batch - 1, 63] += 1
            network_calls = per_image * num_samples // batch
            self.seconds += network_calls * batch
            call_of = np.full(x.shape, per_image)
            return Samples(x, call_of, call_of[:, 0], np.full(num_samples, 0.5), call_of[:, 0], np.int32(network_calls))

        return draw


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.setattr(comparison, "BATCHES", (1, 2))
    monkeypatch.setattr(comparison, "SEEDS", 2)
    monkeypatch.setattr(comparison, "BUDGET", 1e9)
    monkeypatch.setattr(comparison, "_with_mistakes", lambda arm, key: {})

    def run(**options):
        rows, _ = comparison.compare(lambda: ARM, 4, None, jax.random.key(0), io.StringIO(), **options)
        return {(row["sampler"], row["batch"]): row for row in rows}

    return run


def test_a_sampler_that_errs_in_one_value_of_any_seed_is_not_exact(compare, monkeypatch):
    Doctored(monkeypatch, wrong="fixed_point:4")
    rows = compare()
    assert rows["fixed_point:4", 1]["exact"] is False and rows["fixed_point:4", 2]["exact"] is False
    assert (rows["cached", 2]["exact"], rows["cached", 2]["images_compared"]) == (True, 4)
    assert rows["modules:4", 1]["exact"] is True
    # The reference is not compared with itself, and other noise draws other images.
    for name in ("fixed_point", "fixed_point_fresh_noise"):
        assert (rows[name, 1]["exact"], rows[name, 1]["images_compared"]) == (None, 0)


def test_predictive_samplers_are_measured_as_they_are_run(compare, monkeypatch):
    doctored = Doctored(monkeypatch)
    rows = compare()
    assert ("fixed_point", 16, 2) in doctored.compiled and ("cached", 2, 2) in doctored.compiled
    refilled = rows["fixed_point", 2]
    assert (refilled["images"], refilled["refilled"], refilled["network_calls"]) == (16, True, 128)
    # 16 calls of 2 lanes at one second each are shared by two images.
    assert refilled["seconds_per_image"] == pytest.approx(16.0)
    assert (refilled["calls_percent"], refilled["calls_of_an_image"]) == (25.0, 16.0)
    assert (rows["cached", 2]["refilled"], rows["cached", 2]["seconds_per_image"]) == (False, 64.0)


def test_baselines_of_larger_batches_are_the_calls_of_one_image_at_the_time_of_a_call(compare, monkeypatch):
    Doctored(monkeypatch)
    row = compare()["ancestral", 2]
    # 64 calls of two lanes, each two seconds, shared by two images.
    assert (row["seconds_per_image"], row["network_calls"], row["seeds"]) == (64.0, 64, 0)
    assert row["exact"] is None and row["margin"] is None and row["digests"] == []


def test_without_the_reference_nothing_is_called_exact(compare, monkeypatch):
    Doctored(monkeypatch)
    monkeypatch.setattr(comparison, "BUDGET", 20.0)
    rows = compare()
    # One batch of two would take 32 seconds by the fixed point, and its estimate draws nothing.
    assert rows["fixed_point", 2]["seeds"] == 0 and rows["fixed_point", 2]["seconds_per_image"] == 16.0
    assert {row["exact"] for (_, batch), row in rows.items() if batch == 2} == {None}


def test_rows_of_an_earlier_start_are_not_measured_again_and_still_compared_with(compare, monkeypatch):
    Doctored(monkeypatch, wrong="cached")
    kept = []
    first = compare(keep=lambda rows: kept.append(list(rows)))
    assert [len(rows) for rows in kept] == list(range(1, len(first) + 1))
    doctored = Doctored(monkeypatch, wrong="cached")
    again = compare(done=kept[0])  # the fixed point at batch 1
    assert again == first
    assert ("fixed_point", 1, 1) not in doctored.compiled and again["cached", 1]["exact"] is False


def test_a_row_gives_the_smallest_margin_of_all_seeds():
    runs = [
        Samples(*np.ones((4, 1, 64)), np.array([1.0]), np.int32(1))._replace(margin=np.array([m])) for m in (3, 2, 4)
    ]
    assert comparison.measured(Sampler("cached"), 1, runs, [1.0] * 3, None)["margin"] == 2


def test_a_loop_draws_no_more_batches_than_half_the_budget_allows(monkeypatch):
    monkeypatch.setattr(comparison, "BUDGET", 100.0)
    # 10 calls of a second each at batch 1, so a batch of 2 takes at most 20 seconds.
    before = {"seconds_per_image": 10.0, "images": 1, "network_calls": 10, "batch": 1, "calls_of_an_image": 10.0}
    assert comparison._batches(Sampler("last"), 2, before) == 2
    assert comparison._batches(Sampler("last"), 2, before | {"seconds_per_image": 0.1}) == samplers.CHUNK


def test_every_image_of_a_request_is_completed_from_its_own_given_pixels(monkeypatch):
    def compiled(*_, **options):
        def draw(params, key, given, first_id, temperature, count):
            n = len(given)
            drawn = np.where(given < 0, first_id + np.arange(n)[:, None], given)
            return Samples(drawn, drawn, drawn[:, 0], np.ones(n), np.ones(n), np.int32(1))

        return draw

    monkeypatch.setattr(samplers, "compiled", compiled)
    given = np.where(np.arange(64) < 32, 100 + np.arange(19)[:, None], -1)
    x = samplers.draw(ARM, Sampler("fixed_point"), jax.random.key(0), 19, 2, given=given).x
    np.testing.assert_array_equal(x, np.where(given < 0, np.arange(19)[:, None], given))


def test_what_takes_too_long_is_estimated_from_the_row_before():
    before = {"sampler": "last", "batch": 1, "calls_of_an_image": 30.0, "seeds": 5, "calls_percent": 50.0}
    row = comparison._estimated(before, 8, 0.4)
    assert row["seconds_per_image"] == pytest.approx(30 * 0.4 / 8) and (row["batch"], row["images"]) == (8, 8)
    assert comparison._batches(Sampler("last"), 1, None) == 1
