"""What a VQ-VAE-2 config may say: one frozen dataclass for each section, every key checked by name.

Defaults are the supplement's (Tables 1 and 3) where it gives a value. Not here: the published experiments (`configs/`).
"""

import dataclasses
import math

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
    dtype: str = "float32"  # of the convolutions; or 'bfloat16'. Parameters, quantiser and loss stay float32

    def __post_init__(self) -> None:
        _at_least(self, 1, "hidden", "residual", "residual_layers", "code_dim")
        if not 2 <= self.num_codes <= 2**16:
            raise ValueError(f"num_codes must lie in 2..65536, not {self.num_codes}")
        # `stages` names the priors of two levels; three come with their own configs.
        if len(self.strides) != 2:
            raise ValueError(f"strides must name two levels, not {self.strides}")
        for stride in self.strides:
            if stride < 2 or stride & (stride - 1):
                raise ValueError(f"strides must be powers of two, not {self.strides}")
        _check_dtype(self.dtype)
        if not 0 <= self.commitment < math.inf:
            raise ValueError(f"commitment must be finite and at least 0, not {self.commitment}")
        if not 0 < self.codebook_epsilon < math.inf:
            raise ValueError(f"codebook_epsilon must be finite and positive, not {self.codebook_epsilon}")
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


@dataclasses.dataclass(frozen=True)
class PriorConfig:
    """The network of a prior (`prior.py`). A filter of 5 in the paper is a quadrant of side 3 here."""

    hidden: int = 512
    residual: int = 2048
    layers: int = 20
    kernel: int = 3
    activation: str = "elu"  # or 'concat_elu', as PixelSNAIL
    embedding: int = 64
    attention_every: int = 0  # layers between two attentions; 0: none
    attention_heads: int = 8
    attention_features: int = 256  # key, query and value dimensions of all heads together
    output_layers: int = 0
    dropout: float = 0.1
    class_conditional: bool = False
    dtype: str = "float32"  # of the layers; or 'bfloat16'. Parameters, logits and likelihood stay float32
    remat: bool = False  # compute activations of layers again in the backward pass: less memory, a third more work

    def __post_init__(self) -> None:
        _at_least(self, 1, "hidden", "residual", "layers", "kernel", "embedding", "attention_heads")
        _at_least(self, 0, "attention_every", "output_layers")
        if self.activation not in ("elu", "concat_elu"):
            raise ValueError(f"activation must be 'elu' or 'concat_elu', not '{self.activation}'")
        _check_dtype(self.dtype)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")
        if self.attention_every and self.attention_features % self.attention_heads:
            raise ValueError(
                f"attention_features must be a multiple of attention_heads={self.attention_heads}, "
                f"not {self.attention_features}"
            )


@dataclasses.dataclass(frozen=True)
class ConditioningConfig:
    """The stack that turns the codes above into a map (`conditioning.py`), from the finest resolution down."""

    blocks: int = 20
    widths: tuple[int, ...] = (1024, 2048, 2048)
    bottlenecks: tuple[int, ...] = (256, 512, 512)
    norm: str = "batch"  # as the paper; or 'group', 'none'

    def __post_init__(self) -> None:
        _at_least(self, 1, "blocks")
        if not self.widths or len(self.widths) != len(self.bottlenecks) or min(*self.widths, *self.bottlenecks) < 1:
            raise ValueError(f"widths must match bottlenecks={self.bottlenecks} one to one, not {self.widths}")
        if self.norm not in ("batch", "group", "none"):
            raise ValueError(f"norm must be 'batch', 'group' or 'none', not '{self.norm}'")


@dataclasses.dataclass(frozen=True)
class ConditionedPriorConfig(PriorConfig):
    """A prior below the top level."""

    residual: int = 1024
    conditioning: ConditioningConfig = dataclasses.field(default_factory=ConditioningConfig)


@dataclasses.dataclass(frozen=True)
class TopStageConfig:
    model: PriorConfig
    optim: OptimConfig
    train: TrainConfig


@dataclasses.dataclass(frozen=True)
class BottomStageConfig:
    model: ConditionedPriorConfig
    optim: OptimConfig
    train: TrainConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """A VQ-VAE-2 run: `family` is 'vqvae2'."""

    family: str
    seed: int
    data: DataConfig
    mesh: MeshConfig
    autoencoder: AutoencoderStageConfig
    codes: CodesConfig
    top: TopStageConfig
    bottom: BottomStageConfig


def _at_least(config: object, least: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, not {getattr(config, name)}")


def _check_dtype(dtype: str) -> None:
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', not '{dtype}'")
