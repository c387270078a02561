"""MaCow on CelebA-HQ at 256x256 and 5 bits (Ma et al. 2019, Table 4 and Figure 7), and Glow beside it.

    python train.py --config=configs/flows_celebahq256.py --config.data.data_dir=$HOME/tensorflow_datasets

Meant for: 8 accelerators with 32 GB (batch 40, rematerialised).
Parameters: 172 M.
Reach: 0.95 bits/dim uniform, 0.67 variational (the paper's); Glow 1.03. Not yet reproduced here.
Variants: variational, glow, tiny (seconds, on noise; for tests).
"""

from ml_collections import ConfigDict

from bitsperdim import config_files

VARIANTS = ("variational", "glow", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", *VARIANTS):
        raise ValueError(f"no variant '{variant}'; there are {', '.join(VARIANTS)}")
    config = config_files.load("flows_lsun128:variational" if variant == "variational" else "flows_lsun128")
    config.data = ConfigDict({"source": "tfds", "name": "celeb_a_hq/256", "data_dir": "", "image_size": 256, "bits": 5})
    # The data set has no split of its own that is held out.
    config.data.train_split, config.data.evaluation_split = "train[:90%]", "train[90%:]"
    config.model.flow.update(
        {
            "steps": ((4,), (24, 24), (16, 16), (16, 16), (8, 8), (4, 4), (2,)),
            "widths": (24, 256, 256, 256, 256, 256, 512),
            "prior_affine": True,  # although the steps are additive
        }
    )
    config.model.init_images = 32
    config.train.batch_size, config.train.accumulation = 40, 1
    edits = {"variational": lambda config: config, "glow": _glow, "tiny": _tiny}
    return edits[variant](config) if variant else config


def _glow(config: ConfigDict) -> ConfigDict:
    flow = {"kind": "glow", "steps": ((32,),) * 6, "widths": (512,) * 6, "factor": 2, "memory": "reversible"}
    config.model.flow = ConfigDict(flow | {"affine": False, "prior_affine": False})
    return config


def _tiny(config: ConfigDict) -> ConfigDict:
    config = config_files.load("flows_lsun128:tiny")
    config.model.flow.prior_affine = True
    return config
