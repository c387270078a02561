"""PixelCNN with a forecasting module on CIFAR-10 (Wiggers & Hoogeboom 2020, supplement, Table 1, "Default").

    python train.py --config=configs/arm_cifar10.py:5bit --config.data.data_dir=$HOME/tensorflow_datasets
    python sample.py --workdir=runs/arm_cifar10-5bit --compare_samplers

Meant for: one GPU or TPU core (about 25 GMAC an image forward). A step needs 0.6 GiB an image beside
    0.6 GiB of state, as the compiler plans it for a CPU (`python -m benchmarks memory`): 39 GiB, and 10 GiB with
    --config.arm.train.accumulation=4. `:cpu` for one CPU core, about forty minutes, 1.629 bits/dim.
Parameters: 56.9 M.
Reach: the supplement gives settings, no likelihoods. For `:dmol` OpenAI's PixelCNN++ reports 2.92 bits/dim and the
    PyTorch port, on which the paper builds, 2.95. OpenAI's began from a data-dependent initialisation and with the last
    convolution of each layer scaled by 0.1, the port and this code with neither.
Variants: 5bit (32 levels), dmol (the baseline, PixelCNN++ with its own optimiser), modules_afterwards (5 bits, the
    modules trained on the frozen model with pairs from its sampler), cpu (5 bits, small), tiny (seconds; for tests).
"""

from ml_collections import ConfigDict

VARIANTS = ("5bit", "dmol", "modules_afterwards", "cpu", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", *VARIANTS):
        raise ValueError(f"no variant '{variant}'; there are {', '.join(VARIANTS)}")
    config = ConfigDict(
        {
            "family": "arm_forecast",
            "seed": 0,
            "data": {"source": "tfds", "name": "cifar10:3.0.2", "data_dir": "", "image_size": 32, "bits": 8},
            "mesh": {"data": -1, "fsdp": 1},
            "arm": {
                "model": {"resnets": 5, "filters": 162, "dropout": 0.5},
                "forecast": {"modules": 1, "filters": 162, "weight": 0.01},
                "optim": {
                    "name": "adam",
                    "learning_rate": 2e-4,
                    "schedule": "exponential",
                    "exponential_rate": 0.999995,
                    "l2": 1e-6,
                },
                # No Polyak average: the paper evaluates the weights themselves.
                "train": {"batch_size": 64, "steps": 200_000, "ema_decay": 0.0},
            },
        }
    )
    edits = {"5bit": _five_bit, "dmol": _dmol, "modules_afterwards": _modules_afterwards, "cpu": _cpu, "tiny": _tiny}
    return edits[variant](config) if variant else config


def _five_bit(config: ConfigDict) -> ConfigDict:
    config.data.bits = 5
    return config


def _dmol(config: ConfigDict) -> ConfigDict:
    """Salimans et al. 2017: their head, optimiser and Polyak average."""
    config.arm.model = ConfigDict(
        {"resnets": 5, "filters": 160, "dropout": 0.5, "dropout_kind": "element", "output": "dmol", "weight_norm": True}
    )
    config.arm.forecast.modules = 0
    rate = {"learning_rate": 1e-3, "schedule": "exponential", "exponential_rate": 0.999995}
    config.arm.optim = ConfigDict({"name": "adam", "b1": 0.95, "b2": 0.9995, **rate})
    config.arm.train = ConfigDict({"batch_size": 128, "steps": 200_000, "ema_decay": 0.9995})
    return config


def _modules_afterwards(config: ConfigDict) -> ConfigDict:
    config = _five_bit(config)
    config.arm.forecast.modules = 0
    config.modules = ConfigDict(
        {
            "model": {"modules": 1, "filters": 162},
            "optim": {"name": "adam", "learning_rate": 2e-4},
            "train": {"batch_size": 64, "steps": 20_000, "ema_decay": 0.0},
            "pairs": 10_000,
        }
    )
    return config


def _cpu(config: ConfigDict) -> ConfigDict:
    config = _five_bit(config)
    config.arm.model = ConfigDict({"resnets": 1, "filters": 48, "dropout": 0.0})
    config.arm.forecast.filters = 48
    config.arm.optim = ConfigDict({"name": "adam", "learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 50})
    every = {"log_every": 50, "evaluate_every": 2800, "pictures_every": 1400, "save_every": 250}
    config.arm.train = ConfigDict({"batch_size": 8, "steps": 2800, "ema_decay": 0.99, **every})
    return config


def _tiny(config: ConfigDict) -> ConfigDict:
    config = _cpu(config)
    config.data.train_split, config.data.evaluation_split = "test[:90%]", "test[99%:]"  # one shard to decode, not five
    config.arm.model.filters = config.arm.forecast.filters = 6
    config.arm.train.batch_size, config.arm.train.steps, config.arm.optim.warmup_steps = 16, 6, 2
    return config
