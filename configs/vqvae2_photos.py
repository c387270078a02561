"""VQ-VAE-2 on crops of two photographs that ship inside scikit-learn: a whole run in minutes, on anything.

    python train.py --config=configs/vqvae2_photos.py

Meant for: two CPU cores, about four minutes; the first thing to run.
Reach: on the 2,100 held-out crops, MSE at most 5% of their variance with at least 80% of each codebook in use.
Variants: tiny (seconds; for tests).
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict(
        {
            "family": "vqvae2",
            "seed": 0,
            "data": {"source": "photos", "image_size": 32},
            "mesh": {"data": -1, "fsdp": 1},
            "autoencoder": {
                "model": {"hidden": 64, "residual": 32, "code_dim": 32, "num_codes": 512, "flip": True},
                "optim": {"name": "adam", "learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 50},
                "train": {"batch_size": 64, "steps": 600, "ema_decay": 0.99},
            },
            "codes": {"batch_size": 64},
            "top": {
                "model": {"hidden": 64, "residual": 128, "layers": 4, "dropout": 0.1},
                "optim": {"name": "adam", "learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 50},
                "train": {"batch_size": 64, "steps": 500, "ema_decay": 0.99},
            },
            "bottom": {
                "model": {
                    "hidden": 64,
                    "residual": 128,
                    "layers": 4,
                    "dropout": 0.1,
                    "conditioning": {"blocks": 2, "widths": (64,), "bottlenecks": (64,), "norm": "group"},
                },
                "optim": {"name": "adam", "learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 50},
                "train": {"batch_size": 64, "steps": 500, "ema_decay": 0.99},
            },
        }
    )
    if variant not in ("", "tiny"):
        raise ValueError(f"no variant '{variant}'; there is tiny")
    if variant == "tiny":
        for stage in (config.autoencoder, config.top, config.bottom):
            stage.train.batch_size, stage.train.steps, stage.optim.warmup_steps = 16, 6, 2
            stage.model.hidden, stage.model.residual = 8, 8
        config.autoencoder.model.code_dim, config.autoencoder.model.num_codes = 8, 32
        config.top.model.layers = config.bottom.model.layers = 1
        config.bottom.model.conditioning = ConfigDict(
            {"blocks": 1, "widths": (8,), "bottlenecks": (8,), "norm": "group"}
        )
    return config
