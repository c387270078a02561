"""What a VQ-VAE-2 config may say: one frozen dataclass for each section, every key checked by name.

Defaults are the supplement's (Tables 1 and 3) where it gives a value. Not here: the published experiments (`configs/`).
"""

import dataclasses

from bitsperdim.data import DataConfig
from bitsperdim.optim import OptimConfig
from bitsperdim.sharding import MeshConfig
from bitsperdim.step import TrainConfig


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The encoder, the decoder and the codebooks. Strides run from the image upwards: (4, 2) is bottom, top."""

    strides: tuple[int, ...] = (4, 2)
    hidden: int = 128
    residual: int = 64
    residual_layers: int = 2
    code_dim: int = 64
    num_codes: int = 512
    commitment: float = 0.25  # beta
    # DeepMind's notebook divides the squared error by the variance of the data, which makes beta independent of the
    # pixel range; the supplement does not say. False: the plain squared error.
    scale_by_variance: bool = True
    codebook_decay: float = 0.99
    codebook_epsilon: float = 1e-5
    revival_threshold: float = (
        0.05  # fraction of the fair share of hits below which a code is revived; 0: never (paper)
    )
    flip: bool = False  # mirror training images with probability 1/2

    def __post_init__(self) -> None:
        _at_least(self, 1, "hidden", "residual", "residual_layers", "code_dim")
        _at_least(self, 2, "num_codes")
        # `stages` names the priors of two levels; three come with their own configs.
        if len(self.strides) != 2:
            raise ValueError(f"strides must name two levels, not {self.strides}")
        for stride in self.strides:
            if stride < 2 or stride & (stride - 1):
                raise ValueError(f"strides must be powers of two, not {self.strides}")
        if not 0 < self.codebook_decay < 1:
            raise ValueError(f"codebook_decay must lie in (0, 1), not {self.codebook_decay}")
        if not 0 <= self.revival_threshold < 1:
            raise ValueError(f"revival_threshold must lie in [0, 1), not {self.revival_threshold}")


@dataclasses.dataclass(frozen=True)
class AutoencoderStageConfig:
    model: AutoencoderConfig
    optim: OptimConfig
    train: TrainConfig


@dataclasses.dataclass(frozen=True)
class CodesConfig:
    """The extraction of codes with the Polyak weights."""

    batch_size: int = 128

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch_size")


def _at_least(config: object, least: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, not {getattr(config, name)}")


@dataclasses.dataclass(frozen=True)
class Config:
    """A VQ-VAE-2 run."""

    family: str
    seed: int
    data: DataConfig
    mesh: MeshConfig
    autoencoder: AutoencoderStageConfig
    codes: CodesConfig
