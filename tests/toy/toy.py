"""The smallest family on the 1,797 digits of scikit-learn.

    python train.py --config=tests/toy/toy.py

Meant for: the tests of the training loop.
Variants: none.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant:
        raise ValueError(f"no variant '{variant}'")
    return ConfigDict(
        {
            "family": "toy_family",
            "seed": 1,
            "data": {"source": "digits"},
            "mesh": {"data": -1, "fsdp": 1, "smallest": 0},
            "model": {"hidden": 16, "dropout": 0.2, "nan_from": 2**31 - 1},
            "optim": {"name": "adam", "learning_rate": 3e-3, "schedule": "constant", "warmup_steps": 3},
            "train": {
                "batch_size": 16,
                "steps": 12,
                "accumulation": 1,
                "clip_norm": 50.0,
                "ema_decay": 0.9,
                "max_non_finite": 50,
                "log_every": 1,
                "evaluate_every": 8,
                "pictures_every": 8,
                "save_every": 4,
                "keep_checkpoints": 2,
            },
        }
    )
