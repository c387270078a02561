"""MaCow with learned dequantization on a folder of your own images, of any size that four halvings divide.

    python train.py --config=configs/flows_folder.py --config.data.path=$HOME/pictures --workdir=runs/mine

Meant for: one GPU with 16 GB at 64x64; for other sizes `--config.data.image_size=128`.
Parameters: 60.3 M.
Reach: that depends on the images; 5 bits (`--config.data.bits=5`) look better early.
Variants: uniform, cpu (32x32, a small network for two CPU cores), tiny (8x8, seconds; for tests).
"""

from ml_collections import ConfigDict

from bitsperdim import config_files


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "uniform", "cpu", "tiny"):
        raise ValueError(f"no variant '{variant}'; there are uniform, cpu, tiny")
    config = config_files.load("flows_cifar10:cpu" if variant == "cpu" else "flows_imagenet64:variational")
    edge = 32 if variant == "cpu" else 64
    config.data = ConfigDict({"source": "folder", "path": "pictures", "image_size": edge, "train_crop": "random"})
    if variant == "cpu":
        return config
    flow = {"steps": ((4,), (8, 8), (8, 8), (8, 8), (8,)), "widths": (24, 256, 256, 256, 256)}
    config.model.flow.update(flow)
    config.model.flip = True
    config.train = ConfigDict({"batch_size": 32, "steps": 200_000, "ema_decay": 0.999})
    if variant == "uniform":
        config.model.dequantization = None
    if variant == "tiny":
        config.data.image_size = 8
        config.model.flow.update({"steps": ((1,), (1,)), "widths": (4, 4)})
        config.model.dequantization.flow.update({"steps": ((1,), (1,)), "widths": (4, 4)})
        config.model.update({"init_images": 32, "measured_samples": 2, "chunk": 2})
        config.evaluation = ConfigDict({"samples": 4})
        config.train.batch_size, config.train.steps, config.optim.warmup_steps = 16, 6, 2
    return config
