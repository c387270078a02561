"""PixelCNN with a forecasting module on a folder of your own images.

    python train.py --config=configs/arm_folder.py --config.data.path=$HOME/pictures --workdir=runs/mine

Meant for: one GPU with 16 GB at 32x32; `:cpu` for two CPU cores. A step takes as many times longer
as there are more pixels, sampling more than that. Grey images: `--config.data.channels=1`.
Parameters: 12.4 M.
Reach: that depends on the images. Compare the training with the held-out `bits_per_dim`: the best step is kept.
Variants: 8bit (256 levels), cpu (a small network), tiny (8x8, seconds; for tests).
"""

from ml_collections import ConfigDict

from bitsperdim import config_files

VARIANTS = ("8bit", "cpu", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", *VARIANTS):
        raise ValueError(f"no variant '{variant}'; there are {', '.join(VARIANTS)}")
    config = config_files.load("arm_cifar10:cpu" if variant in ("cpu", "tiny") else "arm_cifar10:5bit")
    bits = 8 if variant == "8bit" else 5
    config.data = ConfigDict(
        {"source": "folder", "path": "pictures", "image_size": 32, "train_crop": "random", "bits": bits}
    )
    if variant in ("", "8bit"):
        config.arm.model.resnets, config.arm.model.filters, config.arm.forecast.filters = 3, 96, 96
        config.arm.train = ConfigDict({"batch_size": 32, "steps": 100_000, "best_metric": "bits_per_dim"})
    if variant == "tiny":
        config.data.image_size = 8
        config.arm.model.filters = config.arm.forecast.filters = 6
        config.arm.train.batch_size, config.arm.train.steps, config.arm.optim.warmup_steps = 16, 6, 2
    return config
