"""The table of samplers: rows outlive an interruption, belong to what they were measured with, and say what agreed."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from bitsperdim import plots, sampler_table
from bitsperdim.errors import InputError

CONDITIONS = {"device": "cpu", "seed": 3, "steps": {"model": 20}}


def row(sampler="a", batch=1, seconds=0.5, **more):
    values = {"sampler": sampler, "batch": batch, "seconds_per_image": seconds, "exact": None, "seeds": 2}
    return values | {"calls_percent": 10.0, "calls_deviation": 1.0, "seconds_deviation": None} | more


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sampler_table, "conditions", lambda run, seed: CONDITIONS | {"seed": seed})
    return epath.Path(tmp_path)


def comparing(names, stop_before=None):
    """A comparison that is killed before it measures a sampler, and the samplers that it measured."""
    begun = []

    def compare(key, stream, done, keep):
        rows = list(done)
        for name in names:
            if any(row["sampler"] == name for row in rows):
                continue
            if name == stop_before:
                raise KeyboardInterrupt
            begun.append(name)
            rows.append(row(name))
            keep(rows)
        return rows, {}

    return compare, begun


def test_a_comparison_that_is_stopped_goes_on_behind_its_last_row(folder):
    compare, _ = comparing("abc", stop_before="c")
    with pytest.raises(KeyboardInterrupt):
        sampler_table.measure(compare, None, 3, folder)
    kept = json.loads((folder / "samplers.json").read_text())
    assert kept["complete"] is False and [row["sampler"] for row in kept["rows"]] == ["a", "b"]
    compare, begun = comparing("abc")
    rows, _ = sampler_table.measure(compare, None, 3, folder)
    assert begun == ["c"] and [row["sampler"] for row in rows] == ["a", "b", "c"]
    table = sampler_table.read(folder / "samplers.json")
    assert table == (CONDITIONS, rows, True)
    # What is complete is measured anew.
    compare, begun = comparing("abc")
    sampler_table.measure(compare, None, 3, folder)
    assert begun == ["a", "b", "c"]


@pytest.mark.parametrize("change", [{"seed": 4}, {"device": "TPU v9"}, {"steps": {"model": 21}}])
def test_rows_of_other_weights_devices_or_seeds_are_not_gone_on_from(folder, change):
    sampler_table.write(folder / "samplers.json", sampler_table.Table(CONDITIONS | change, [row()], False))
    assert sampler_table.begun(folder / "samplers.json", CONDITIONS) == []
    assert sampler_table.begun(folder / "samplers.json", CONDITIONS | change) == [row()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"device": "cpu", "se', r"is damaged \(.*\); remove it, or measure again: sample.py --compare_samplers"),
        (json.dumps(CONDITIONS), "lacks rows"),
        (json.dumps(CONDITIONS | {"rows": [row(), {"sampler": "a"}]}), "row 2: batch is None"),
        (json.dumps(CONDITIONS | {"rows": [row(batch=0)]}), "row 1: batch and seconds must be above 0"),
        (json.dumps(CONDITIONS | {"rows": [row(seconds=None)]}), "row 1: seconds_per_image is None"),
        (json.dumps(CONDITIONS | {"rows": ["fast"]}), "row 1: it is no object"),
    ],
)
def test_a_damaged_table_is_refused_with_what_to_do_and_replaced_by_the_next(folder, text, message):
    (folder / "samplers.json").write_text(text)
    with pytest.raises(InputError, match=message):
        sampler_table.read(folder / "samplers.json")
    assert sampler_table.begun(folder / "samplers.json", CONDITIONS) == []


def test_seeds_are_drawn_until_the_time_is_spent_but_at_least_one(monkeypatch):
    clock = iter(np.arange(100.0))
    monkeypatch.setattr(sampler_table.time, "perf_counter", lambda: next(clock))
    assert sampler_table.repeated(lambda seed: seed * seed, 5, 3.0) == ([0, 1, 4], [1.0] * 3)
    assert sampler_table.repeated(lambda seed: seed, 2, 99.0) == ([0, 1], [1.0] * 2)
    assert sampler_table.repeated(lambda seed: seed, 5, 0.0) == ([0], [1.0])


def test_agreement_is_that_of_all_images_that_both_drew():
    draw = lambda seed: np.asarray(jax.random.randint(jax.random.key(seed), (4, 6), 0, 9))
    ours = [sampler_table.digest(draw(seed)) for seed in range(3)]
    assert sampler_table.agreement(ours, ours[:2], 4) == {"exact": True, "images_compared": 8}
    # One value in the last image of the last seed.
    other = draw(2).copy()
    other[3, 5] += 1
    changed = [*ours[:2], sampler_table.digest(other)]
    assert sampler_table.agreement(ours, changed, 4) == {"exact": False, "images_compared": 12}
    assert sampler_table.agreement(ours, [], 4) == {"exact": None, "images_compared": 0}


def test_the_plot_shows_measured_points_filled_and_estimates_hollow():
    rows = [row("a", batch, seeds=2) for batch in (1, 8)] + [row("a:4", 8, seeds=0)]
    filled, hollow = (plots.samplers(some).astype(int) for some in (rows[:2], [rows[0], rows[1] | {"seeds": 0}]))
    assert filled.shape == hollow.shape and (hollow.sum(-1) > filled.sum(-1)).any()
    assert plots.samplers(rows).ndim == 3
