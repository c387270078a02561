"""VQ-VAE-2 on ImageNet 256 (Razavi et al. 2019, Tables 1 and 3): autoencoder, top prior 32x32, bottom prior 64x64.

    python train.py --config=configs/vqvae2_imagenet.py --config.data.data_dir=$HOME/tensorflow_datasets
    python train.py --config=configs/vqvae2_imagenet.py:table4_b128_h256_r1024_a2 --stage=top

Meant for: 8 accelerators of 16 GB (parameters sharded over all of them, bfloat16, micro-batches). By the compiled
programs each needs 9.1 GiB for the top and 11.2 GiB for the bottom prior, computing in float32 (`python -m benchmarks
sizes`); with more memory or devices lower `train.accumulation`. The paper had 8 TPU cores for the autoencoder and 128
for the priors. `:small_prior` for one GPU.
Parameters: autoencoder 1.72 M, top 642 M, bottom 942 M.
Reach: validation MSE 0.0050, top 3.41 and bottom 3.45 nats per code (from the paper; not yet reproduced here). The
columns of Table 4 are logged by their names, `nats_per_code_at_64_epochs` and `nats_per_code_at_1m_steps`. Its last row
(batch 1024, 512/2048, 4 attentions) is this config's top prior: 3.49 and 3.42. The others have the dense layers
(`model.reading`), twice the parameters, so that those without attention see as much.
Variants: tiny (seconds; for tests), paper (no revival of dead codes, which the paper does not have: expect most of the
    codebook unused for long; plain Polyak average from the first step; BatchNorm in the bottom prior, which is the
    paper's only where a micro-batch is the whole batch, so with the devices for `bottom.train.accumulation=1`; here it
    is group normalisation, the same for any micro-batch), small_prior (the cheapest top prior of Table 4, batch 64,
    64/256, no attention: 3.62), table4_b128_h256_r1024_a2 (any row of Table 4 by its batch, hidden units, residual
    units and attention layers), table5_vq, table5_ae8, table5_ae16, table5_ae32, table5_ae64 (the ablation of
    quantisation at 128 pixels: one map of 32x32, a prior of 256 hidden units; 27.19 dB at 4,919 bits an image with
    codes, and 32.41, 37.33, 45.92, 49.80 dB at 36,933, 62,047, 115,231, 196,484 bits with unregularised latents of so
    many dimensions), table5_tiny (seconds; for tests).
"""

import re

from ml_collections import ConfigDict

# Batch, hidden, residual, attention layers of the top prior.
TABLE_4 = (
    *((batch, hidden, 4 * hidden, a) for batch in (64, 128, 256) for hidden in (64, 128, 256) for a in (0, 2)),
    (1024, 512, 2048, 4),
)
IMAGES, LAYERS = 1_281_167, 20


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict(
        {
            "family": "vqvae2",
            "seed": 0,
            "data": {
                "source": "tfds",
                "name": "imagenet2012",
                "data_dir": "",
                "image_size": 256,
                "train_crop": "random",
                "evaluation_split": "validation",
            },
            # Kernels, their averages and moments: a part on every device.
            "mesh": {"data": 1, "fsdp": -1},
            "autoencoder": {
                "model": {"strides": (4, 2), "flip": True, "dtype": "bfloat16"},
                "optim": {"name": "adam", "learning_rate": 2e-4},
                "train": {"batch_size": 128, "steps": 2_207_444} | _every(10_000),
            },
            "codes": {"batch_size": 128},
            "top": {
                "model": _prior(residual=2048) | {"attention_every": 5, "attention_heads": 8, "output_layers": 20},
                "optim": _sqrt(hidden=512),
                "train": {"batch_size": 1024, "steps": 1_600_000, "accumulation": 16} | _every(20_000) | _columns(1024),
            },
            "bottom": {
                "model": _prior(residual=1024) | {"conditioning": {"blocks": 20, "norm": "group"}},
                "optim": _sqrt(hidden=512),
                "train": {"batch_size": 512, "steps": 754_000, "accumulation": 32} | _every(10_000),
            },
        }
    )
    if variant in EDITS:
        return EDITS[variant](config)
    if row := re.fullmatch(r"table5_(vq|ae8|ae16|ae32|ae64|tiny)", variant):
        return _table_5(config, row[1])
    if row := re.fullmatch(r"table4_b(\d+)_h(\d+)_r(\d+)_a(\d+)", variant):
        return _table_4(config, *map(int, row.groups()))
    raise ValueError(
        f"no variant '{variant}'; there are {', '.join(filter(None, EDITS))}, table5_vq, table5_aeD "
        "(D = 8, 16, 32, 64), table5_tiny and table4_bB_hH_rR_aA"
    )


def _every(steps: int) -> dict:
    return {"ema_decay": 0.9999, "evaluate_every": steps, "pictures_every": steps, "save_every": 1000}


def _columns(batch: int) -> dict:
    """Those of Table 4."""
    return {"milestones": (("64_epochs", round(64 * IMAGES / batch)), ("1m_steps", 1_000_000))}


def _prior(residual: int) -> dict:
    sizes = {"hidden": 512, "residual": residual, "layers": LAYERS, "filter": 5, "dropout": 0.1}
    return sizes | {"class_conditional": True, "dtype": "bfloat16", "remat": True}


def _sqrt(hidden: int) -> dict:
    c = {"learning_rate": 0.18, "hidden_units": hidden, "warmup_steps": 16_000}
    return {"name": "adam", "schedule": "sqrt", **c}


def _paper(config: ConfigDict) -> ConfigDict:
    config.autoencoder.model.revival_threshold = 0.0
    config.bottom.model.conditioning.norm = "batch"
    for stage in (config.autoencoder, config.top, config.bottom):
        stage.train.ema_ramp = False
    return config


def _table_4(config: ConfigDict, batch: int, hidden: int, residual: int, attentions: int) -> ConfigDict:
    if (batch, hidden, residual, attentions) not in TABLE_4:
        rows = ", ".join("b{}_h{}_r{}_a{}".format(*row) for row in TABLE_4)
        raise ValueError(f"no row b{batch}_h{hidden}_r{residual}_a{attentions} in Table 4; there are {rows}")
    model, train = config.top.model, config.top.train
    model.hidden, model.residual = hidden, residual
    model.attention_every = LAYERS // attentions if attentions else 0
    model.attention_features = hidden // 2
    if (batch, hidden, residual, attentions) != TABLE_4[-1]:
        # The same layers with and without attention, or rows would differ in more than what they name.
        model.reading = "causal"
    config.top.optim = ConfigDict(_sqrt(hidden))
    train.batch_size, train.accumulation = batch, max(1, batch * hidden // (64 * 512))
    train.milestones = _columns(batch)["milestones"]
    train.steps = max(step for _, step in train.milestones)
    return config


def _table_5(config: ConfigDict, row: str) -> ConfigDict:
    """Supplement, B.1. It names the prior's batch, hidden units and attention layers; the rest is Table 4's. The bins
    of the latents, which it does not name, are 256 for each dimension."""
    config = _table_4(config, batch=256, hidden=256, residual=1024, attentions=2)
    config.top.model.reading = "auto"  # every row has attention here
    config.data.image_size = 128
    config.autoencoder.model.strides = (4,)
    del config["bottom"]
    if row == "tiny":
        config = _tiny(config)
    if row != "vq":
        # The mixture of 64 dimensions has 21,450 outputs a cell.
        dim = 3 if row == "tiny" else int(row.removeprefix("ae"))
        config.autoencoder.model.update({"quantizer": "none", "code_dim": dim, "num_codes": 256})
        config.top.train.accumulation = max(config.top.train.get("accumulation", 1), dim // 8)
    return config


def _small_prior(config: ConfigDict) -> ConfigDict:
    return _table_4(config, batch=64, hidden=64, residual=256, attentions=0)


def _tiny(config: ConfigDict) -> ConfigDict:
    config.data = ConfigDict({"source": "photos", "image_size": 32})
    config.mesh = ConfigDict({"data": -1, "fsdp": 1})
    config.autoencoder.model.update({"hidden": 8, "residual": 8, "code_dim": 8, "num_codes": 32})
    small = {"hidden": 8, "residual": 8, "layers": 2, "output_layers": 0, "class_conditional": False}
    config.top.model.update(small | {"attention_every": 1, "attention_heads": 2, "attention_features": 8})
    config.top.model.output_layers = 1
    if "bottom" in config:
        config.bottom.model.update(small | {"conditioning": {"blocks": 1, "widths": (8,), "bottlenecks": (8,)}})
    for name in {"autoencoder", "top", "bottom"} & set(config):
        config[name].train = ConfigDict({"batch_size": 16, "steps": 6})
    return config


EDITS = {"": lambda config: config, "tiny": _tiny, "paper": _paper, "small_prior": _small_prior}
