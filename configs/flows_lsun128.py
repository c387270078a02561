"""MaCow on LSUN bedrooms at 128x128 and 5 bits (Ma et al. 2019, Table 4 and Figures 4 to 6), and Glow beside it.

    python train.py --config=configs/flows_lsun128.py --config.data.data_dir=$HOME/tensorflow_datasets

Meant for: 8 accelerators with 32 GB (batch 160 in 4 parts, rematerialised).
Parameters: 167 M.
Reach: no figure; the published one for these images could not be verified.
Variants: variational, glow, church, church_variational, tower, tower_variational, tiny (seconds, on noise; for tests).
"""

from ml_collections import ConfigDict

from bitsperdim import config_files

VARIANTS = ("variational", "glow", "church", "church_variational", "tower", "tower_variational", "tiny")
NAMES = {"church": "lsun/church_outdoor", "tower": "lsun/tower"}


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", *VARIANTS):
        raise ValueError(f"no variant '{variant}'; there are {', '.join(VARIANTS)}")
    config = config_files.load("flows_imagenet64")
    config.data = ConfigDict({"source": "tfds", "name": "lsun/bedroom", "data_dir": "", "image_size": 128, "bits": 5})
    config.data.evaluation_split = "validation"
    config.model.flow = ConfigDict(
        {
            "steps": ((4,), (32, 32), (32, 32), (16, 16), (12, 12), (6,)),
            "widths": (24, 256, 256, 256, 256, 512),
            "kernel": (2, 5),
            "affine": False,
            "prior_affine": False,
            "memory": "remat",
        }
    )
    config.model.init_images = 512
    config.train.accumulation = 4
    if variant == "tiny":
        return _tiny(config)
    if variant == "glow":
        return _glow(config)
    scene, _, noise = variant.rpartition("_") if "_" in variant else (variant, "", "")
    if "variational" in (scene, noise):
        config = _variational(config)
    if scene in NAMES:
        config.data.name = NAMES[scene]
    return config


def _variational(config: ConfigDict) -> ConfigDict:
    flow = {"steps": ((2,), (4,), (4,)), "widths": (24, 256, 256), "factor": 2, "kernel": (2, 3), "memory": "remat"}
    config.model.dequantization = ConfigDict({"flow": flow, "condition_channels": 4})
    return config


def _glow(config: ConfigDict) -> ConfigDict:
    flow = {"kind": "glow", "steps": ((64,),) * 5, "widths": (512,) * 5, "factor": 2, "memory": "reversible"}
    config.model.flow = ConfigDict(flow | {"affine": False, "prior_affine": False})
    return config


def _tiny(config: ConfigDict) -> ConfigDict:
    flow = config.model.flow
    config = config_files.load("flows_imagenet64:tiny")
    config.data.synthetic_levels = 32
    config.model.flow.affine, config.model.flow.prior_affine = flow.affine, flow.prior_affine
    return config
