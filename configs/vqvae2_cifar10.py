"""VQ-VAE-2 on CIFAR-10: two levels (8x8 and 4x4 codes), class-conditional priors.

    python train.py --config=configs/vqvae2_cifar10.py --config.data.data_dir=$HOME/tensorflow_datasets

Meant for: one GPU or TPU core; `:cpu` for two CPU cores, a quarter of an hour (21 CPU-minutes).
Parameters: autoencoder 1.72 M, top 58.9 M, bottom 133 M.
Reach: there is no published figure for this data set; what `:cpu` reached is in MEASURED.md.
Variants: cpu, tiny (seconds; for tests).
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "cpu", "tiny"):
        raise ValueError(f"no variant '{variant}'; there are cpu and tiny")
    config = ConfigDict(
        {
            "family": "vqvae2",
            "seed": 0,
            "data": {"source": "tfds", "name": "cifar10:3.0.2", "data_dir": "", "image_size": 32},
            "mesh": {"data": -1, "fsdp": 1},
            "autoencoder": {
                "model": {"hidden": 128, "residual": 64, "code_dim": 64, "num_codes": 512, "flip": True},
                "optim": {"name": "adam", "learning_rate": 2e-4, "schedule": "constant"},
                "train": {"batch_size": 128, "steps": 100_000, "ema_decay": 0.9999},
            },
            "codes": {"batch_size": 128},
            "top": {
                "model": _prior() | {"attention_every": 4},
                "optim": _sqrt(hidden=256),
                "train": {"batch_size": 128, "steps": 50_000, "clip_norm": 1.0, "ema_decay": 0.9999},
            },
            "bottom": {
                "model": _prior() | {"conditioning": _conditioning(width=256, blocks=8)},
                "optim": _sqrt(hidden=256),
                "train": {"batch_size": 128, "steps": 50_000, "clip_norm": 1.0, "ema_decay": 0.9999},
            },
        }
    )
    if variant == "cpu":
        return _cpu(config)
    return _tiny(config) if variant == "tiny" else config


def _prior() -> dict:
    return {"hidden": 256, "residual": 1024, "layers": 8, "dropout": 0.1, "class_conditional": True}


def _sqrt(hidden: int) -> dict:
    """The schedule of the paper's priors, its warm-up shortened like the run."""
    c = {"learning_rate": 0.18, "hidden_units": hidden, "warmup_steps": 4000}
    return {"name": "adam", "schedule": "sqrt", **c}


def _conditioning(width: int, blocks: int) -> dict:
    # The top grid of 4x4 is too small to be halved twice, as the paper does from 32x32.
    return {"blocks": blocks, "widths": (width,), "bottlenecks": (width,), "norm": "batch"}


def _cpu(config: ConfigDict) -> ConfigDict:
    config.autoencoder.model.hidden, config.autoencoder.model.residual = 64, 32
    config.autoencoder.model.code_dim = 32
    # In so few steps the bottom codes learn all that the decoder looks at, unless some images come without them; and
    # the averages of the codebooks have to follow an encoder that moves fast.
    config.autoencoder.model.level_dropout, config.autoencoder.model.codebook_decay = 0.1, 0.9
    for stage, steps in ((config.autoencoder, 3000), (config.top, 4000), (config.bottom, 3500)):
        stage.optim = ConfigDict({"name": "adam", "learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 100})
        stage.train = ConfigDict({"batch_size": 32, "steps": steps, "ema_decay": 0.995})
    for stage in (config.top, config.bottom):
        stage.model.hidden, stage.model.residual, stage.model.layers = 64, 64, 4
        # Half the work of all that comes before; without attention, what lies above to the right is left out.
        stage.model.reading = "quadrant"
    config.top.model.attention_features = 64
    config.bottom.model.conditioning = ConfigDict(_conditioning(width=64, blocks=2))
    return config


def _tiny(config: ConfigDict) -> ConfigDict:
    config = _cpu(config)
    config.data.train_split, config.data.evaluation_split = "test[:90%]", "test[90%:]"  # one shard to decode, not five
    for stage in (config.autoencoder, config.top, config.bottom):
        stage.train.batch_size, stage.train.steps, stage.optim.warmup_steps = 16, 6, 2
        stage.model.hidden, stage.model.residual = 8, 8
    config.autoencoder.model.code_dim, config.autoencoder.model.num_codes = 8, 32
    config.top.model.layers, config.top.model.attention_every, config.top.model.attention_features = 1, 1, 8
    config.bottom.model.layers = 1
    config.bottom.model.conditioning = ConfigDict(_conditioning(width=8, blocks=1))
    return config
