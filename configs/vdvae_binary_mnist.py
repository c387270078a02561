"""Efficient-VDVAE on binary MNIST (Hazami et al. 2022, Table 4).

    python train.py --config=configs/vdvae_binary_mnist.py:released --config.data.data_dir=$HOME/tensorflow_datasets

Pixels are drawn anew from the grey values in every epoch, and once for all in the test set, as in the published runs:
this is not the fixed binarisation of Larochelle & Murray (`:fixed_binarisation`), whose figures cannot be compared.
Meant for: one GPU; `:cpu` for two CPU cores. The base is `:released` with a bfloat16 trunk, a Polyak average that warms
up, and the whole test set.
Parameters: 69.9 M.
Reach: released 79.09 nats on one half of the test set (published; not yet reproduced here). The paper samples at a
temperature of 1.
Variants: released, fixed_binarisation, reference_split (`released` on a half of the test set, as published; which half
    is not known), cpu, tiny (seconds; for tests).
"""

from ml_collections import ConfigDict

from bitsperdim import config_files

VARIANTS = ("released", "fixed_binarisation", "reference_split", "cpu", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", *VARIANTS):
        raise ValueError(f"no variant '{variant}'; there are {', '.join(VARIANTS)}")
    config = config_files.load("vdvae_cifar10:released")
    config.data = ConfigDict({"source": "tfds", "name": "mnist:3.0.1", "data_dir": "", "binarize": "dynamic"})
    layers = (5, 5, 10, 2, 1)
    config.model.update({"layers": layers, "skips": layers, "shared": (), "blocks": layers})
    config.model.widths = (512, 256, 128, 64, 32)
    config.model.update({"bottlenecks": (1.0,) * 5, "flip": False, "output": "bernoulli"})
    config.objective = ConfigDict({"kl_steps": 500, "gamma_steps": 1000})
    config.optim.update({"cosine_start": 5000, "cosine_steps": 195_000, "final_fraction": 0.1})
    config.train.update({"batch_size": 32, "steps": 200_000})
    if variant == "":
        config.model.dtype, config.train.ema_ramp = "bfloat16", True
    elif variant == "fixed_binarisation":
        config.data = ConfigDict({"source": "tfds", "name": "binarized_mnist", "data_dir": ""})
    elif variant == "reference_split":
        config.data.evaluation_split = "test[50%:]"
    return _cpu(config, variant) if variant in ("cpu", "tiny") else config


def _cpu(config: ConfigDict, variant: str) -> ConfigDict:
    layers = (2, 3, 4, 2, 1)
    config.model.update({"layers": layers, "skips": layers, "blocks": layers, "widths": (96, 64, 48, 24, 16)})
    config.model.bottlenecks, config.model.latents = (0.5, 0.5, 0.5, 0.5, 1.0), (16, 16, 8, 8, 4)
    config.objective = ConfigDict({"kl_steps": 200, "gamma_steps": 400})
    config.optim = ConfigDict({"name": "adamax", "learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 100})
    every = {"log_every": 50, "evaluate_every": 3000, "pictures_every": 1000, "save_every": 500}
    config.train = ConfigDict({"batch_size": 16, "steps": 6000, "skip_norm": 800.0, "ema_decay": 0.999, **every})
    if variant == "tiny":
        config.data.train_split, config.data.evaluation_split = "test[:90%]", "test[99%:]"
        one = (1,) * 5
        config.model.update({"layers": one, "skips": one, "blocks": one, "widths": (8,) * 5, "latents": (2,) * 5})
        config.train = ConfigDict({"batch_size": 16, "steps": 6})
        config.optim.warmup_steps = 2
    return config
