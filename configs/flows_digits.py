"""MaCow on the 8x8 digits that ship inside scikit-learn: a first flow in a minute or two.

    python train.py --config=configs/flows_digits.py

Meant for: two CPU cores.
Parameters: 0.09 M.
Reach: there is no published figure for this data set (17 levels).
Variants: variational (learned noise), glow, glow_variational (the baseline, of as many parameters), tiny (seconds; for
    tests).
"""

from ml_collections import ConfigDict

VARIANTS = ("variational", "glow", "glow_variational", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", *VARIANTS):
        raise ValueError(f"no variant '{variant}'; there are {', '.join(VARIANTS)}")
    every = {"log_every": 100, "evaluate_every": 500, "pictures_every": 500, "save_every": 500}
    config = ConfigDict(
        {
            "family": "flows",
            "seed": 0,
            "data": {"source": "digits"},
            "mesh": {"data": -1, "fsdp": 1},
            "model": {"flow": {"steps": ((1,), (2, 2), (2,)), "widths": (16, 48, 48)}},
            "optim": {
                "name": "adam",
                "learning_rate": 1e-3,
                "warmup_steps": 50,
                "schedule": "exponential",
                "exponential_rate": 0.999997,
            },
            "train": {"batch_size": 64, "steps": 1000, "ema_decay": 0.99, **every},
        }
    )
    edits = {
        "variational": _variational,
        "glow": _glow,
        "glow_variational": lambda config: _variational(_glow(config)),
        "tiny": _tiny,
    }
    return edits[variant](config) if variant else config


def _variational(config: ConfigDict) -> ConfigDict:
    config.model.dequantization = ConfigDict({"flow": {"steps": ((1,), (2,)), "widths": (16, 32)}})
    return config


def _glow(config: ConfigDict) -> ConfigDict:
    """93,184 parameters; MaCow's flow has 92,256."""
    config.model.flow = ConfigDict({"kind": "glow", "steps": ((7,), (7,)), "widths": (48, 48), "factor": 2})
    return config


def _tiny(config: ConfigDict) -> ConfigDict:
    config.model.flow = ConfigDict({"steps": ((1,), (1,)), "widths": (4, 4)})
    config.model.measured_samples, config.model.chunk, config.model.init_images = 2, 2, 32
    config.evaluation = ConfigDict({"samples": 4})
    config.train.batch_size, config.train.steps, config.optim.warmup_steps = 16, 6, 2
    return config
