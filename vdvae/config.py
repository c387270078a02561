"""What a config of a very deep VAE may say: one frozen dataclass for each section, every key checked by name.

Defaults are those that all released Efficient-VDVAE configs share. Not here: the published experiments (`configs/`),
and what the levels of a hierarchy are made of once the images are known (`levels.py`).
"""

import dataclasses
import math

from bitsperdim.config import at_least, one_of
from bitsperdim.data import DataConfig
from bitsperdim.optim import OptimConfig
from bitsperdim.sharding import MeshConfig
from bitsperdim.step import TrainConfig

PER_LEVEL = ("layers", "skips", "blocks", "widths", "bottlenecks", "kernels", "latents")
OPTIONAL_PER_LEVEL = ("skip_widths", "cells", "shared")
BINS = ("normalised", "published_efficient", "published_vdvae")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The hierarchy, its latents and its output. The tuples run from the deepest level to that of the image."""

    strides: tuple[int, ...]  # each level's edge over that of the level before it; of the first 1
    layers: tuple[int, ...]  # top-down layers, each with latents; 0: the level has one block and no latents
    skips: tuple[int, ...]  # of them with a skip connection of their own; the rest follow the layer of `shared`
    blocks: tuple[int, ...]  # bottom-up blocks; 'vdvae' has one more before it pools
    widths: tuple[int, ...]
    bottlenecks: tuple[float, ...]  # width inside a residual cell over that of its input
    kernels: tuple[int, ...]  # of the two middle convolutions of a cell: 1 or 3
    latents: tuple[int, ...]  # channels of each layer's latents
    skip_widths: tuple[int, ...] = ()  # 'efficient'; (): the widths
    cells: tuple[int, ...] = ()  # 'efficient': residual cells in a block; (): one everywhere
    shared: tuple[int, ...] = ()  # number of the skip connection that layers without one use; (): the first, 0
    style: str = "efficient"  # blocks of Efficient-VDVAE | 'vdvae'
    constants_up_to: int = 64  # 'vdvae': edge of the largest level with a learned constant
    scale_z_projection: bool = True  # initial kernels times 1 / sqrt(L); without it the first steps diverge
    scale_last_convolutions: bool = True  # those of residual cells too
    zero_prior: bool = False  # the prior's last convolution begins at zero; 'vdvae': always
    first_convolutions: str = "torch"  # initial values of each cell's first one: the released PyTorch's | 'glorot'
    latent: str = "std"  # std = softplus(u), the gradient smoothing | 'log_std': std = exp(beta u)
    latent_beta: float = math.log(2.0)  # softplus(u) = log(1 + exp(beta u)) / beta
    residual_posterior: bool = False  # posterior relative to the prior
    output: str = "logistic_mixture"  # | 'bernoulli', of images with 2 levels
    mixtures: int = 10
    output_scale: str = "std"  # as `latent`, of the logistics
    output_beta: float = math.log(2.0)
    min_log_scale: float = -250.0  # of the logistics, before beta where it is 'log_std'; -250: unbounded
    bins: str = "normalised"  # | arithmetic of the published codes, whose mass is not 1 below 8 bits
    target_bits: int = 8  # of the image whose likelihood it is, where the encoder sees 8 bits; `data.bits` reduces both
    whiten: tuple[float, ...] = ()  # (mean, deviation) of the encoder's input, in levels; (): to [-1, 1]
    flip: bool = False  # training images left to right, each with probability 1/2
    dtype: str = "float32"  # of the trunk: | 'bfloat16'; distributions and likelihood are float32 always
    precision: str = "default"  # of convolutions in float32 on accelerators: | 'high' | 'highest'
    scan: bool = True  # like layers of a level in one loop of the compiled program; False: unrolled, slow to compile
    remat: int = 0  # levels of this edge and above compute activations again in the backward pass; 0: none

    def __post_init__(self) -> None:
        _check_levels(self)
        one_of(self, style=("efficient", "vdvae"), first_convolutions=("torch", "glorot"), bins=BINS)
        one_of(self, latent=("std", "log_std"), output_scale=("std", "log_std"))
        one_of(self, output=("logistic_mixture", "bernoulli"), dtype=("float32", "bfloat16"))
        one_of(self, precision=("default", "high", "highest"))
        at_least(self, 1, "mixtures")
        at_least(self, 0, "remat", "constants_up_to")
        for key in ("latent_beta", "output_beta"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"{key} must be positive, not {getattr(self, key)}")
        if not -math.inf < self.min_log_scale < math.inf:
            raise ValueError(f"min_log_scale must be finite, not {self.min_log_scale}")
        if not 1 <= self.target_bits <= 8:
            raise ValueError(f"target_bits must lie in 1..8, not {self.target_bits}")
        if self.whiten and (len(self.whiten) != 2 or not self.whiten[1] > 0):
            raise ValueError(f"whiten must be (mean, deviation) in levels, or (), not {self.whiten}")


def _check_levels(config: ModelConfig) -> None:
    count = len(config.strides)
    if not count or config.strides[0] != 1:
        raise ValueError(f"strides must begin with 1, the deepest level's, not {config.strides}")
    for key in (*PER_LEVEL, *OPTIONAL_PER_LEVEL):
        values = getattr(config, key)
        if len(values) != count and not (key in OPTIONAL_PER_LEVEL and not values):
            raise ValueError(f"{key} must have {count} elements as strides, not {values}")
    for key in ("strides", "widths", "latents", "skip_widths", "cells"):
        if min(getattr(config, key), default=1) < 1:
            raise ValueError(f"{key} must be at least 1, not {getattr(config, key)}")
    pairs = zip(config.strides[1:], config.widths, config.widths[1:], strict=False)
    if any(stride == 1 and (before != width or config.style == "vdvae") for stride, before, width in pairs):
        raise ValueError(
            f"strides must exceed 1 behind the first where widths change or the style is 'vdvae', not {config.strides}"
        )
    if not set(config.kernels) <= {1, 3}:
        raise ValueError(f"kernels must be 1 or 3, not {config.kernels}")
    if config.layers[0] < 1:
        raise ValueError(f"layers must begin with at least 1, not {config.layers}")
    for layers, skips, blocks in zip(config.layers, config.skips, config.blocks, strict=True):
        if layers < 0 or not min(layers, 1) <= skips <= layers:
            raise ValueError(f"skips must lie in 1..layers at each level, not {config.skips} of {config.layers}")
        if config.style == "efficient" and blocks < max(skips, 1):
            raise ValueError(f"blocks must be at least skips and 1 at each level, not {config.blocks}")
        if config.style == "vdvae" and (blocks < 0 or skips != 1):
            raise ValueError(f"skips must be 1 and blocks at least 0 at each level of style 'vdvae', not {skips}")
    for shared, skips in zip(config.shared, config.skips, strict=False):
        if not 0 <= shared < max(skips, 1):
            raise ValueError(f"shared must lie below skips at each level, not {config.shared} of {config.skips}")
    for width, ratio in zip(config.widths, config.bottlenecks, strict=True):
        if not int(width * ratio) >= 1:
            raise ValueError(f"bottlenecks must leave a channel of {config.widths}, not {config.bottlenecks}")
    if config.style == "vdvae":
        if config.skip_widths or set(config.cells) - {1}:
            raise ValueError("skip_widths must be () and cells 1 for the style 'vdvae'")
        if list(config.widths) != sorted(config.widths, reverse=True):
            raise ValueError(f"widths must not grow towards the image for the style 'vdvae', not {config.widths}")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """-log p(x | z) + beta sum_l gamma_l KL_l. The defaults train the bound itself from the first step."""

    kl_steps: int = 0  # beta rises linearly for as many steps (and `kl_start` more); 0: it is 1
    kl_start: int = 21  # before it beta is `kl_least`
    kl_least: float = 1e-4
    # gamma balances the layers up to this step; 0: never. KL_l is the mean over the global batch, for which
    # accumulation needs a forward pass more as long.
    gamma_steps: int = 0

    def __post_init__(self) -> None:
        at_least(self, 0, "kl_steps", "kl_start", "gamma_steps")
        if not 0 <= self.kl_least <= 1:
            raise ValueError(f"kl_least must lie in [0, 1], not {self.kl_least}")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What evaluate.py measures beside the bound."""

    samples: int = 1  # K of the importance-weighted bound; 1: it is left out, for it takes as many passes

    def __post_init__(self) -> None:
        at_least(self, 1, "samples")


@dataclasses.dataclass(frozen=True)
class EncodingConfig:
    """The stage `latents`: which channels of the latents of a data set are stored, and how."""

    keep: float = 0.03  # share with the largest KL; the others are drawn from the prior. 1: all
    count: str = "channels"  # what it is a share of: as published | 'dimensions'
    images: int = 10_000  # of the training split, at most, from which the KL of each channel is known
    dtype: str = "float32"  # of means and log-deviations: | 'float16', half the bytes
    batch_size: int = 64  # images encoded or decoded at once on all devices together

    def __post_init__(self) -> None:
        one_of(self, count=("channels", "dimensions"), dtype=("float32", "float16"))
        at_least(self, 1, "images", "batch_size")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must lie in (0, 1], not {self.keep}")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How `sample.py` draws where its flags do not say."""

    temperatures: tuple[float, ...] = (1.0,)  # of the prior's deviations: one, or one for each level, deepest first
    output_temperature: float = 1.0
    batch_size: int = 16  # images drawn at once on all devices together

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size")
        at_least(self, 0, "output_temperature")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(f"temperatures must be at least 0, one or one for each level, not {self.temperatures}")


@dataclasses.dataclass(frozen=True)
class Config:
    """A run of a very deep VAE, `family` 'vdvae': the stage `model`, and on request `latents`."""

    family: str
    seed: int
    data: DataConfig
    mesh: MeshConfig
    model: ModelConfig
    optim: OptimConfig
    train: TrainConfig
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    encoding: EncodingConfig = dataclasses.field(default_factory=EncodingConfig)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if len(self.sampling.temperatures) not in (1, len(self.model.strides)):
            raise ValueError(
                f"sampling.temperatures must have 1 or {len(self.model.strides)} elements, "
                f"not {self.sampling.temperatures}"
            )

    @property
    def levels(self) -> tuple[str, ...]:
        """The names of the levels, deepest first: their edge over that of the deepest, which mostly has the edge 1."""
        return tuple(str(math.prod(self.model.strides[: i + 1])) for i in range(len(self.model.strides)))
