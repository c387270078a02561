"""VQ-VAE-2 on FFHQ 1024 (Razavi et al. 2019, Tables 2 and 3): three levels of 128x128, 64x64 and 32x32 codes.

    python train.py --config=configs/vqvae2_ffhq.py --config.data.path=$HOME/ffhq/images1024x1024

Meant for: 8 accelerators of 16 GB (parameters sharded over all of them, bfloat16, micro-batches). By the compiled
programs each needs 8.5, 9.0 and 7.1 GiB for the priors from the top down, computing in float32
(`python -m benchmarks sizes`); with more memory or devices lower `train.accumulation`. The paper had 8 TPU cores for
the autoencoder and 128 for the priors. With --stage=autoencoder, --config.mesh.data=1 --config.mesh.fsdp=1
--config.mesh.spatial=8 divides each image by rows. The 70,000 PNG files of FFHQ lie below `data.path`.
Parameters: autoencoder 3.27 M, top 579 M, middle 436 M, bottom 455 M.
Reach: the paper gives no figures for this data set.
What the paper leaves open: Table 2 lost a cell, so the middle prior's 8 attention heads are a guess, and its 57,400
steps are odd beside the others.
Variants: tiny (seconds; for tests), paper (no revival of dead codes; plain Polyak average from the first step;
    BatchNorm in the middle and the bottom prior, which is the paper's only with the devices for `accumulation=1`: else
    each micro-batch is normalised by itself. Here it is group normalisation, the same for any micro-batch).
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "tiny", "paper"):
        raise ValueError(f"no variant '{variant}'; there are tiny and paper")
    config = ConfigDict(
        {
            "family": "vqvae2",
            "seed": 0,
            "data": {"source": "folder", "path": "images1024x1024", "image_size": 1024},
            # Kernels, their averages and moments: a part on every device.
            "mesh": {"data": 1, "fsdp": -1},
            "autoencoder": {
                "model": {"strides": (8, 2, 2), "flip": True, "dtype": "bfloat16", "colour": _colour()},
                "optim": {"name": "adam", "learning_rate": 2e-4},
                "train": {"batch_size": 128, "steps": 304_741, "accumulation": 4} | _every(5000),
            },
            "codes": {"batch_size": 32},
            "top": {
                "model": _prior(residual=2048, layers=20, dropout=0.5) | {"attention_every": 5},
                "optim": _sqrt(0.324),
                "train": {"batch_size": 1024, "steps": 237_000, "accumulation": 16} | _every(5000),
            },
            "middle": {
                "model": _prior(residual=1024, layers=20, dropout=0.3)
                | {"attention_every": 20, "conditioning": {"blocks": 8, "norm": "group"}},
                "optim": _sqrt(0.324),
                "train": {"batch_size": 512, "steps": 57_400, "accumulation": 64} | _every(5000),
            },
            "bottom": {
                "model": _prior(residual=1024, layers=10, dropout=0.25)
                | {"conditioning": {"blocks": 8, "norm": "group"}},
                "optim": _sqrt(0.18),
                "train": {"batch_size": 256, "steps": 270_000, "accumulation": 32} | _every(5000),
            },
        }
    )
    if variant == "paper":
        return _paper(config)
    return _tiny(config) if variant == "tiny" else config


def _colour() -> dict:
    """Supplement, A.1."""
    changes = {"brightness": 0.08, "hue": 0.02, "saturation": 0.1, "contrast": 0.1}
    return changes | {"noise": 0.02, "noise_probability": 0.5}


def _every(steps: int) -> dict:
    return {"ema_decay": 0.9999, "evaluate_every": steps, "pictures_every": steps, "save_every": 1000}


def _prior(residual: int, layers: int, dropout: float) -> dict:
    sizes = {"hidden": 512, "residual": residual, "layers": layers, "filter": 5, "dropout": dropout}
    return sizes | {"dtype": "bfloat16", "remat": True}


def _sqrt(coefficient: float) -> dict:
    c = {"learning_rate": coefficient, "hidden_units": 512, "warmup_steps": 16_000}
    return {"name": "adam", "schedule": "sqrt", **c}


def _paper(config: ConfigDict) -> ConfigDict:
    config.autoencoder.model.revival_threshold = 0.0
    for stage in (config.middle, config.bottom):
        stage.model.conditioning.norm = "batch"
    for stage in (config.autoencoder, config.top, config.middle, config.bottom):
        stage.train.ema_ramp = False
    return config


def _tiny(config: ConfigDict) -> ConfigDict:
    config.data = ConfigDict({"source": "photos", "image_size": 64})
    config.mesh = ConfigDict({"data": -1, "fsdp": 1})
    config.autoencoder.model.update({"hidden": 8, "residual": 8, "code_dim": 8, "num_codes": 32})
    small = {"hidden": 8, "residual": 8, "layers": 1, "attention_features": 8}
    config.top.model.update(small | {"attention_every": 1})
    conditioning = {"conditioning": {"blocks": 1, "widths": (8,), "bottlenecks": (8,)}}
    config.middle.model.update(small | conditioning | {"attention_every": 1})
    config.bottom.model.update(small | conditioning)
    for stage in (config.autoencoder, config.top, config.middle, config.bottom):
        stage.train = ConfigDict({"batch_size": 16, "steps": 6})
    return config
