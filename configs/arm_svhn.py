"""PixelCNN with a forecasting module on SVHN, 8 bits (Wiggers & Hoogeboom 2020, supplement, Table 1, "Default").

    python train.py --config=configs/arm_svhn.py --config.data.data_dir=$HOME/tensorflow_datasets

Meant for: one GPU or TPU core, as `arm_cifar10`.
Parameters: 56.9 M.
Reach: the supplement gives settings, no likelihood.
Variants: tiny (seconds; for tests).
"""

from ml_collections import ConfigDict

from bitsperdim import config_files


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny"):
        raise ValueError(f"no variant '{variant}'; there is tiny")
    config = config_files.load(f"arm_cifar10:{variant}")
    config.data.name, config.data.bits = "svhn_cropped", 8
    return config
