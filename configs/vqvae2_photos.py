"""VQ-VAE-2 on crops of two photographs that ship inside scikit-learn: a whole run in minutes, on anything.

    python train.py --config=configs/vqvae2_photos.py

Meant for: one CPU core, about four and a half minutes; the first thing to run.
Parameters: autoencoder 0.43 M, top 0.53 M, bottom 0.76 M.
Reach: on the 1,400 held-out crops, MSE at most 5% of their variance, with every level in use: at most 12% from the top
codes alone, and at least twice the error without them (`mse_without_bottom`, `mse_without_top`).
Variants: tiny (seconds; for tests), pixels (one stage more, a PixelCNN decoder, which bounds the likelihood of the
    image; about twice as long).
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny", "pixels"):
        raise ValueError(f"no variant '{variant}'; there are tiny and pixels")
    config = ConfigDict(
        {
            "family": "vqvae2",
            "seed": 0,
            "data": {"source": "photos", "image_size": 32},
            "mesh": {"data": -1, "fsdp": 1},
            "autoencoder": {
                "model": {"hidden": 64, "residual": 32, "code_dim": 32, "num_codes": 512, "flip": True} | _short(),
                "optim": _adam(),
                "train": _train(steps=900),
            },
            "codes": {"batch_size": 128},
            "top": {"model": _prior(), "optim": _adam(), "train": _train(steps=500)},
            "bottom": {
                "model": _prior() | {"conditioning": _conditioning(width=64, blocks=2)},
                "optim": _adam(),
                "train": _train(steps=400),
            },
        }
    )
    if variant == "pixels":
        return _pixels(config)
    return _tiny(config) if variant == "tiny" else config


def _short() -> dict:
    # In so few steps the bottom's 64 codes, nearer to the image, learn all that the decoder looks at; commitment then
    # pulls the top's vectors to one point. Images without bottom codes keep the top in use (`mse_without_top`), and
    # averages over ten batches instead of a hundred follow an encoder that moves this fast.
    return {"level_dropout": 0.1, "codebook_decay": 0.9}


def _adam() -> dict:
    # A short run wants a high rate that ends at zero; the published 2e-4 is for two million steps.
    return {"name": "adam", "learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 50}


def _train(steps: int) -> dict:
    every = {"log_every": 100, "evaluate_every": 500, "pictures_every": 250, "save_every": 250}
    return {"batch_size": 32, "steps": steps, "ema_decay": 0.99, **every}


def _prior() -> dict:
    # Quadrants are half the work of all that comes before; what lies above to the right is left out.
    return {"hidden": 64, "residual": 64, "layers": 4, "dropout": 0.1, "reading": "quadrant"}


def _conditioning(width: int, blocks: int) -> dict:
    # The top grid of 4x4 is too small to be halved twice, as the paper does from 32x32.
    return {"blocks": blocks, "widths": (width,), "bottlenecks": (width,), "norm": "group"}


def _pixels(config: ConfigDict) -> ConfigDict:
    model = _prior() | {"hidden": 32, "residual": 32, "dropout": 0.0}
    model |= {"conditioning": _conditioning(width=32, blocks=2)}
    config.pixels = ConfigDict({"model": model, "optim": _adam(), "train": _train(steps=400)})
    return config


def _tiny(config: ConfigDict) -> ConfigDict:
    for stage in (config.autoencoder, config.top, config.bottom):
        stage.train.batch_size, stage.train.steps, stage.optim.warmup_steps = 16, 6, 2
        stage.model.hidden, stage.model.residual = 8, 8
    config.autoencoder.model.code_dim, config.autoencoder.model.num_codes = 8, 32
    config.top.model.layers = config.bottom.model.layers = 1
    config.bottom.model.conditioning = ConfigDict(_conditioning(width=8, blocks=1))
    return config
