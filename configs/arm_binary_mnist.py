"""PixelCNN with 20 forecasting modules on binary MNIST (Wiggers & Hoogeboom 2020, supplement, Table 1).

    python train.py --config=configs/arm_binary_mnist.py --config.data.data_dir=$HOME/tensorflow_datasets
    python sample.py --workdir=runs/arm_binary_mnist-base --compare_samplers

The data are the fixed binarisation of Larochelle & Murray (2011): 50,000 images to train on, 10,000 to test.
Meant for: any GPU or one TPU core (about 1.2 GMAC an image forward); `:cpu` for one CPU core, about forty
    minutes, 81.0 nats.
Parameters: 4.05 M.
Reach: on this split PixelCNN reaches 81.3 nats, MADE 87, NADE 88.9. The supplement gives settings, no likelihoods.
Variants: default_size (the size of the other data sets, which overfits, as the supplement says), cpu (small), tiny
    (seconds; for tests).
"""

from ml_collections import ConfigDict

from bitsperdim import config_files


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "default_size", "cpu", "tiny"):
        raise ValueError(f"no variant '{variant}'; there are default_size, cpu and tiny")
    config = config_files.load("arm_cifar10")
    config.data = ConfigDict({"source": "tfds", "name": "binarized_mnist", "data_dir": ""})
    if variant != "default_size":
        config.arm.model.resnets, config.arm.model.filters = 2, 60
        config.arm.forecast.modules, config.arm.forecast.filters = 20, 60
    if variant == "cpu":
        return _cpu(config)
    return _tiny(config) if variant == "tiny" else config


def _cpu(config: ConfigDict) -> ConfigDict:
    config.arm.model.resnets, config.arm.model.filters, config.arm.model.dropout = 1, 32, 0.0
    config.arm.forecast.filters = 16
    config.arm.optim = ConfigDict({"name": "adam", "learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 50})
    every = {"log_every": 100, "evaluate_every": 1600, "pictures_every": 800, "save_every": 250}
    config.arm.train = ConfigDict({"batch_size": 16, "steps": 3200, "ema_decay": 0.99, **every})
    return config


def _tiny(config: ConfigDict) -> ConfigDict:
    config = _cpu(config)
    config.data.train_split, config.data.evaluation_split = "validation", "test[95%:]"
    config.arm.model.filters = config.arm.forecast.filters = 6
    config.arm.train.batch_size, config.arm.train.steps, config.arm.optim.warmup_steps = 16, 6, 2
    return config
