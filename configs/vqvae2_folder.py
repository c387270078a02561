"""VQ-VAE-2 on a folder of your own images, of any size that the product of the strides divides (8 here).

    python train.py --config=configs/vqvae2_folder.py --config.data.path=$HOME/pictures --workdir=runs/mine

Meant for: one GPU with 16 GB at 256x256, or any other size: `--config.data.image_size=128`, or `image_height` and
`image_width` with `image_size=0`. From 512 on three levels suit better: `autoencoder.model.strides=(8,2,2)` and a
section `middle`, as in `vqvae2_ffhq.py`.
Parameters: autoencoder 1.72 M, top 145 M, bottom 325 M.
Reach: that depends on the images. Compare the training with the held-out `nats_per_code`: a few thousand images are
soon known by heart.
Variants: cpu (32x32, a small network for two CPU cores), tiny (32x32, seconds; for tests).
"""

from ml_collections import ConfigDict

from bitsperdim import config_files


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "cpu", "tiny"):
        raise ValueError(f"no variant '{variant}'; there are cpu and tiny")
    if variant == "cpu":
        config = config_files.load("vqvae2_photos")
        config.data = ConfigDict({"source": "folder", "path": "pictures", "image_size": 32, "train_crop": "random"})
        return config
    config = ConfigDict(
        {
            "family": "vqvae2",
            "seed": 0,
            "data": {"source": "folder", "path": "pictures", "image_size": 256, "train_crop": "random"},
            "mesh": {"data": -1, "fsdp": 1},
            "autoencoder": {
                "model": {"strides": (4, 2), "flip": True, "dtype": "bfloat16"},
                "optim": {"name": "adam", "learning_rate": 2e-4},
                "train": {"batch_size": 64, "steps": 200_000},
            },
            "codes": {"batch_size": 64},
            "top": {
                "model": _prior() | {"attention_every": 5, "attention_features": 128},
                "optim": _sqrt(),
                "train": {"batch_size": 64, "accumulation": 4, "steps": 200_000, "best_metric": "nats_per_code"},
            },
            "bottom": {
                "model": _prior() | {"conditioning": {"blocks": 8, "widths": (256, 512), "bottlenecks": (128, 256)}},
                "optim": _sqrt(),
                "train": {"batch_size": 32, "accumulation": 4, "steps": 200_000, "best_metric": "nats_per_code"},
            },
        }
    )
    return _tiny(config) if variant == "tiny" else config


def _prior() -> dict:
    sizes = {"hidden": 256, "residual": 1024, "layers": 20, "filter": 5, "dropout": 0.3}
    return sizes | {"dtype": "bfloat16", "remat": True}


def _sqrt() -> dict:
    """The schedule of the paper's priors, its warm-up shortened like the run."""
    return {"name": "adam", "schedule": "sqrt", "learning_rate": 0.18, "hidden_units": 256, "warmup_steps": 8000}


def _tiny(config: ConfigDict) -> ConfigDict:
    config.data.image_size = 32
    config.autoencoder.model.update({"hidden": 8, "residual": 8, "code_dim": 8, "num_codes": 32})
    small = {"hidden": 8, "residual": 8, "layers": 1, "attention_features": 8}
    config.top.model.update(small | {"attention_every": 1})
    config.bottom.model.update(small | {"conditioning": {"blocks": 1, "widths": (8,), "bottlenecks": (8,)}})
    for stage in (config.autoencoder, config.top, config.bottom):
        stage.train = ConfigDict({"batch_size": 16, "steps": 6})
    return config
