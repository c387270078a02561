"""Efficient-VDVAE on the 8x8 digits that ship inside scikit-learn: a whole run in a few minutes.

    python train.py --config=configs/vdvae_digits.py
    python sample.py --workdir=runs/vdvae_digits-base --temperature=0.9

Meant for: two CPU cores; the first very deep VAE to try.
Parameters: 0.35 M.
Reach: there is no published figure for this data set (17 levels); 2.02 bits/dim here, a bound over 360 test images.
Variants: vdvae (the blocks of VDVAE), tiny (seconds; for tests).
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "vdvae", "tiny"):
        raise ValueError(f"no variant '{variant}'; there are vdvae and tiny")
    config = ConfigDict(
        {
            "family": "vdvae",
            "seed": 0,
            "data": {"source": "digits"},
            "mesh": {"data": -1, "fsdp": 1},
            "model": {
                "strides": (1, 2, 2, 2),
                "layers": (2, 2, 2, 1),
                "skips": (2, 2, 2, 1),
                "blocks": (2, 2, 2, 1),
                "widths": (64, 64, 32, 16),
                "bottlenecks": (0.25, 0.5, 0.5, 1.0),
                "kernels": (1, 3, 3, 3),
                "latents": (8, 8, 8, 8),
                "mixtures": 5,
            },
            "objective": {"kl_steps": 200, "gamma_steps": 400},
            "optim": {"name": "adamax", "learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 50},
            "train": {
                "batch_size": 32,
                "steps": 2000,
                "skip_norm": 800.0,
                "ema_decay": 0.995,
                "log_every": 100,
                "evaluate_every": 500,
                "pictures_every": 500,
                "save_every": 500,
            },
            "sampling": {"temperatures": (0.9,)},
        }
    )
    if variant == "vdvae":
        config.model.style, config.model.skips, config.model.blocks = "vdvae", (1,) * 4, (1, 1, 1, 1)
        config.model.bottlenecks, config.model.widths = (0.25,) * 4, (64,) * 4
        config.model.latent, config.model.latent_beta = "log_std", 1.0
        config.model.output_scale, config.model.output_beta, config.model.min_log_scale = "log_std", 1.0, -7.0
        config.objective = ConfigDict({"kl_steps": 0})
        config.optim = ConfigDict({"name": "adamw", "learning_rate": 5e-4, "b2": 0.9, "warmup_steps": 100})
    if variant == "tiny":
        config.model.update({"strides": (1, 8), "layers": (1, 2), "skips": (1, 1), "blocks": (1, 1), "kernels": (1, 3)})
        config.model.update({"widths": (8, 8), "bottlenecks": (0.5, 0.5), "latents": (2, 2), "mixtures": 2})
        config.train.batch_size, config.train.steps, config.optim.warmup_steps = 16, 6, 2
    return config
