"""A discrete autoencoder and a PixelCNN over its 8x8x4 codes on CIFAR-10 (Wiggers & Hoogeboom 2020, supplement A.3).

    python train.py --config=configs/arm_latent_cifar10.py --config.data.data_dir=$HOME/tensorflow_datasets

Meant for: one GPU or TPU core; `:cpu` for one CPU core, about forty minutes.
Parameters: autoencoder 30.0 M, arm 55.0 M.
Reach: the supplement gives settings, no figures.
Variants: cpu (small), tiny (seconds; for tests).
"""

from ml_collections import ConfigDict

from bitsperdim import config_files


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "cpu", "tiny"):
        raise ValueError(f"no variant '{variant}'; there are cpu and tiny")
    config = config_files.load("arm_cifar10")
    # Four channels of codes want a width that four divides; the paper's 162 of Table 1 is not.
    config.arm.model.filters = config.arm.forecast.filters = 160
    config.autoencoder = ConfigDict(
        {
            "model": {"width": 512, "latent_channels": 4, "categories": 128},
            "optim": config.arm.optim.to_dict(),
            "train": {"batch_size": 64, "steps": 50_000, "ema_decay": 0.0},
        }
    )
    if variant == "cpu":
        return _cpu(config)
    return _tiny(config) if variant == "tiny" else config


def _cpu(config: ConfigDict) -> ConfigDict:
    config.autoencoder.model.width = 64
    config.arm.model = ConfigDict({"resnets": 1, "filters": 64, "dropout": 0.2})
    config.arm.forecast.filters = 64
    for stage, steps in ((config.autoencoder, 2500), (config.arm, 2000)):
        stage.optim = ConfigDict({"name": "adam", "learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 50})
        every = {"log_every": 50, "evaluate_every": 1000, "pictures_every": 1000, "save_every": 250}
        stage.train = ConfigDict({"batch_size": 32, "steps": steps, "ema_decay": 0.99, **every})
    return config


def _tiny(config: ConfigDict) -> ConfigDict:
    config = _cpu(config)
    config.data.train_split, config.data.evaluation_split = "test[:90%]", "test[99%:]"  # one shard to decode, not five
    config.autoencoder.model.width, config.autoencoder.model.categories = 8, 16
    config.arm.model.filters = config.arm.forecast.filters = 8
    for stage in (config.autoencoder, config.arm):
        stage.train.batch_size, stage.train.steps, stage.optim.warmup_steps = 16, 6, 2
    return config
