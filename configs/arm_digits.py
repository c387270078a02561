"""PixelCNN with forecasting modules on the 8x8 digits that ship inside scikit-learn: a whole run in a minute or two.

    python train.py --config=configs/arm_digits.py
    python sample.py --workdir=runs/arm_digits-base --compare_samplers

Meant for: two CPU cores; the first autoregressive model to try.
Parameters: 0.34 M.
Reach: there is no published figure for this data set (17 levels); what it reached here is in MEASURED.md.
Variants: tiny (seconds; for tests).
"""

from ml_collections import ConfigDict

from bitsperdim import config_files


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny"):
        raise ValueError(f"no variant '{variant}'; there is tiny")
    config = config_files.load("arm_cifar10:cpu")
    config.data = ConfigDict({"source": "digits"})
    config.arm.model = ConfigDict({"resnets": 1, "filters": 24, "dropout": 0.2})
    config.arm.forecast.modules, config.arm.forecast.filters = 2, 24
    every = {"log_every": 100, "evaluate_every": 500, "pictures_every": 250, "save_every": 250}
    config.arm.train = ConfigDict({"batch_size": 32, "steps": 500, "ema_decay": 0.99, **every})
    if variant == "tiny":
        config.arm.model.filters = config.arm.forecast.filters = 6
        config.arm.train.batch_size, config.arm.train.steps, config.arm.optim.warmup_steps = 16, 6, 2
    return config
