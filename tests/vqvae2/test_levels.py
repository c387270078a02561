"""Runs of one and of three levels, and configs whose sections do not fit their strides."""

import math

import jax
import numpy as np
import pytest

import bitsperdim
from bitsperdim import config as config_lib
from bitsperdim import config_files, data, trainer
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from vqvae2 import codes


def train(tmp_path_factory, strides):
    """What costs compilation and is the same at any number of levels is left out: colours, attention, BatchNorm."""
    config = config_files.load("vqvae2_ffhq:tiny")
    config.data = {"source": "synthetic", "image_size": 16, "synthetic_size": 16}
    values = config_lib.to_plain(config.to_dict())
    values["autoencoder"]["model"] |= {"strides": strides, "residual_layers": 1, "dtype": "float32"}
    values["autoencoder"]["model"] |= {"flip": False, "colour": {}}
    for name in ("middle", "bottom")[: 3 - len(strides)]:
        del values[name]
    for name in values.keys() & {"top", "middle", "bottom"}:
        values[name]["model"] |= {"dtype": "float32", "remat": False, "attention_every": 0, "dropout": 0.0}
        values[name]["model"]["reading"] = "quadrant"
        if name != "top":
            values[name]["model"]["conditioning"]["norm"] = "none"
    for name in values.keys() & {"autoencoder", "top", "middle", "bottom"}:
        values[name]["train"]["steps"] = 1
    return trainer.train(values, str(tmp_path_factory.mktemp("levels") / "run"))


@pytest.fixture(scope="module", params=[(4,), (2, 2, 2)], ids=["one", "three"])
def run(request, tmp_path_factory):
    return train(tmp_path_factory, request.param)


def test_a_run_has_a_prior_for_every_level_and_its_rate_is_their_sum(run):
    levels = run.config.levels
    assert [stage.name for stage in run.stages()] == ["autoencoder", "codes", *levels]
    measured = trainer.evaluate(run, "evaluation")
    grids = {"top": (4, 4)} if len(levels) == 1 else {"top": (2, 2), "middle": (4, 4), "bottom": (8, 8)}
    cells = {level: math.prod(grid) for level, grid in grids.items()}
    nats = sum(measured[f"nats_per_code_{level}"] * cells[level] for level in levels)
    assert measured["rate_bits_per_image"] == pytest.approx(nats / math.log(2.0), rel=1e-9)
    stored = codes.open_codes(run, "evaluation").read(np.arange(3))
    assert {level: stored[level].shape[1:] for level in levels} == grids
    for above, level in enumerate(levels):
        params, _ = jax.eval_shape(run.stage(level).model(run).init, jax.random.key(0))
        assert sum("embedding" in name for name in params.get("conditioner", {})) == above  # all that are coarser


def test_images_are_drawn_level_by_level_and_reconstructed_from_the_stored_codes(run):
    loaded = bitsperdim.load(run.workdir)
    pictures, about = loaded.draw(jax.random.key(0), 2)
    assert pictures.shape == (2, 16, 16, 3)
    assert list(about["calls_per_image"]) == list(run.config.levels)
    source = data.open_source(run.config.data, "evaluation")
    stored = codes.open_codes(run, "evaluation").read(np.arange(4))
    again = loaded.reconstruct(source.read(np.arange(4))["image"])
    np.testing.assert_array_equal(again, loaded.decode({level: stored[level] for level in run.config.levels}))


def test_every_level_has_its_pictures(run):
    names = {path.stem.split("-")[0] for path in run.workdir.glob("*/images/*00000001.png")}
    given = (
        {"reconstructions_by_level", "samples_given_top", "samples_given_middle"}
        if len(run.config.levels) == 3
        else set()
    )
    assert names == {"reconstructions", "samples_top_alone"} | given


@pytest.mark.parametrize(
    ("strides", "message"),
    [
        ((8,), r"bottom must be None where .*strides=\(8,\) makes the levels top, not a section"),
        ((8, 2, 2), r"middle must be a section where .* makes the levels top, middle, bottom, not None"),
        ((), r"autoencoder\.model\.strides must name a level at least, not \(\)"),
    ],
)
def test_sections_that_do_not_fit_the_strides_are_named(strides, message):
    values = config_lib.to_plain(config_files.load("vqvae2_photos:tiny").to_dict())
    values["autoencoder"]["model"]["strides"] = strides
    with pytest.raises(InputError, match=message):
        run_lib.parse(values)


def test_four_levels_share_the_section_of_the_middle_ones():
    values = config_lib.to_plain(config_files.load("vqvae2_ffhq:tiny").to_dict())
    values["autoencoder"]["model"]["strides"] = (4, 2, 2, 2)
    _, config = run_lib.parse(values)
    assert config.levels == ("top", "middle_1", "middle_2", "bottom")
    assert config.prior("middle_1") is config.prior("middle_2") is config.middle
