"""The published experiments: every variant is valid, and says what the supplement's Table 1 says."""

import dataclasses

import pytest

from arm_forecast import pixelcnn
from arm_forecast.pixelcnn import Grid, NetworkConfig
from bitsperdim import config_files
from bitsperdim import run as run_lib

VARIANTS = {
    "arm_binary_mnist": ("", "default_size", "cpu", "tiny"),
    "arm_cifar10": ("", "5bit", "dmol", "modules_afterwards", "cpu", "tiny"),
    "arm_digits": ("", "tiny"),
    "arm_latent_cifar10": ("", "cpu", "tiny"),
    "arm_latent_imagenet32": ("", "tiny"),
    "arm_latent_svhn": ("", "tiny"),
    "arm_svhn": ("", "tiny"),
}
# Of the images of each data set, and of the autoencoder's codes.
CODES, GRIDS = Grid(8, 8, 4, 128), {"binarized_mnist": Grid(28, 28, 1, 2)}


def parsed(name):
    return run_lib.parse(config_files.load(name))[1]


@pytest.mark.parametrize("name", [f"{name}:{variant}" for name, variants in VARIANTS.items() for variant in variants])
def test_every_variant_is_valid_and_its_network_fits_its_images(name):
    config = parsed(name)
    levels, grid = 2**config.data.bits, GRIDS.get(config.data.name)
    grid = CODES if config.autoencoder is not None else grid or Grid(32, 32, 3, levels)
    pixelcnn.check(config.arm.model, grid if config.data.source == "tfds" else Grid(8, 8, 1, 17))
    assert config.arm.forecast.filters % grid.channels == 0
    with pytest.raises(Exception, match="no variant 'other'"):
        config_files.load(f"{name.partition(':')[0]}:other")


PAPERS = ("arm_binary_mnist", "arm_binary_mnist:default_size", "arm_cifar10", "arm_cifar10:5bit", "arm_svhn")
LATENT = ("arm_latent_cifar10", "arm_latent_svhn", "arm_latent_imagenet32")


@pytest.mark.parametrize("name", PAPERS + LATENT)
def test_the_settings_are_those_of_table_1(name):
    config = parsed(name)
    stages = [config.arm] if config.autoencoder is None else [config.arm, config.autoencoder]
    for stage, steps in zip(stages, (200_000, 50_000), strict=False):
        assert (stage.train.steps, stage.train.batch_size, stage.train.ema_decay) == (steps, 64, 0.0)
        optim = stage.optim
        assert (optim.name, optim.learning_rate, optim.l2) == ("adam", 2e-4, 1e-6)
        assert (optim.schedule, optim.exponential_rate) == ("exponential", 0.999995)
    # 162 is not divisible by the four channels of codes; the supplement names 160 for its modules there.
    resnets, filters, count = {"arm_binary_mnist": (2, 60, 20)}.get(name, (5, 160 if name in LATENT else 162, 1))
    assert (config.arm.model.resnets, config.arm.model.filters, config.arm.model.dropout) == (resnets, filters, 0.5)
    assert (config.arm.model.output, config.arm.model.weight_norm) == ("categorical", False)
    forecast = dataclasses.asdict(config.arm.forecast)
    assert forecast == {
        "modules": count,
        "filters": filters,
        "weight": 0.01,
        "inputs": (),
        "posterior": "exact",
        "gradient_to_arm": False,
    }
    assert config.data.bits == (5 if name.endswith("5bit") else 8)
    if config.autoencoder is not None:
        assert dataclasses.astuple(config.autoencoder.model) == (512, 4, 128)


def test_the_full_network_has_the_parameters_of_the_published_one():
    """55,007,624, a gain for each output of weight normalisation included; counted in the PyTorch port."""
    config, grid = NetworkConfig(output="dmol", weight_norm=True), Grid(32, 32, 3, 256)
    sizes = (
        layer.kernel[0] * layer.kernel[1] * layer.inputs * layer.outputs + 2 * layer.outputs
        for layer in pixelcnn.table(config, grid).values()
    )
    assert sum(sizes) == 55_007_624
