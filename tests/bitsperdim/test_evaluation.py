"""Figures of a split against numpy over all of its images at once."""

import math

import jax
import numpy as np
import pytest
import toy_family
from sklearn.datasets import load_digits

from bitsperdim import config as config_lib
from bitsperdim import data, evaluation
from bitsperdim.model import Aux


@pytest.fixture(scope="module")
def case(toy_config):
    config = config_lib.unpack(toy_config().to_dict(), toy_family.Config)
    model = toy_family.make(config)
    return model, model.init(jax.random.key(5)), data.open_source(config.data, "evaluation")


@pytest.fixture(scope="module")
def truth(case):
    """Nats of the last 360 digits, in numpy: |x - x^|^2 / 2 + 32 log(2 pi)."""
    _, (params, _), _ = case
    w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = load_digits().data[-360:] / 16.0
    errors = x - x @ w["encoder"]["kernel"] @ w["decoder"]["kernel"] - w["decoder"]["bias"]
    return 0.5 * np.square(errors).sum(1) + 32.0 * math.log(2.0 * math.pi), (x == 0).sum()


def evaluate(case, mesh, batch_size, progress=lambda done: None):
    model, (params, extra), source = case
    measure = evaluation.compiled(model, mesh)
    return evaluation.evaluate(
        model, measure, params, extra, source, batch_size, mesh, jax.random.key(0), progress=progress
    )


@pytest.mark.parametrize(
    ("num_data", "num_fsdp", "batch_size"),
    [(1, 1, 1), (1, 1, 7), (1, 1, 360), (1, 1, 500), (8, 1, 16), (8, 1, 400), (2, 4, 64)],
)
def test_every_image_counts_once_whatever_the_batch_and_the_devices(
    case, truth, sub_mesh, num_data, num_fsdp, batch_size
):
    nats, black = truth
    figures = evaluate(case, sub_mesh(num_data, num_fsdp), batch_size)
    assert figures["images"] == 360
    assert figures["black"] == black
    assert figures["nats"] == pytest.approx(nats.mean(), rel=1e-5)
    assert figures["bits_per_dim"] == pytest.approx(nats.mean() / 64 / math.log(2), rel=1e-5)
    assert figures["nats_standard_error"] == pytest.approx(nats.std(ddof=1) / math.sqrt(360), rel=1e-4)


def test_progress_counts_images_and_not_padding(case, sub_mesh):
    seen = []
    evaluate(case, sub_mesh(8), 160, seen.append)
    assert seen == [160, 320, 360]


def test_a_maximum_is_that_of_the_images_and_not_of_padding(case, sub_mesh):
    model, variables, source = case
    model = model._replace(summarize=lambda figures, tallies: figures)

    def measure(params, extra, batch, key):
        position = np.asarray(batch["position"])
        return Aux({}, (), (), {"last": np.where(np.asarray(batch["mask"]), position, 10**6)})

    figures = evaluation.evaluate(model, measure, *variables, source, 160, sub_mesh(1), jax.random.key(0))
    assert figures == {"images": 360, "last": 359.0}


def test_counts_beyond_float32_are_exact(case, sub_mesh):
    model, variables, source = case
    many = np.float32(2**24)

    def measure(params, extra, batch, key):
        position = np.asarray(batch["position"])
        return Aux({"nats": np.zeros(len(position))}, {"black": many if position[0] == 0 else np.float32(1)}, ())

    figures = evaluation.evaluate(model, measure, *variables, source, 120, sub_mesh(1), jax.random.key(0))
    assert figures["black"] == 2**24 + 2
