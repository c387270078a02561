"""The smallest family: a linear autoencoder under a Gaussian of unit variance, in 60 lines and without Flax.

It shows what `bitsperdim.model` asks of a family, and lets the loop be tested apart from the models of the papers.
Everything that a run must reproduce is in it: noise per example (dropout, flips), a choice among the examples of the
global batch (`extra['chosen']`, as the revival of codes makes), and averages over it (`extra['pixel_mean']`).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from bitsperdim import augment, data, images, likelihood, rng, trainer
from bitsperdim.data import DataConfig
from bitsperdim.errors import InputError
from bitsperdim.model import Aux, Loaded, Model, Stage
from bitsperdim.optim import OptimConfig
from bitsperdim.sharding import MeshConfig
from bitsperdim.step import TrainConfig

NUM_CHOSEN = 4


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    hidden: int = 16
    dropout: float = 0.2
    nan_from: int = 2**31 - 1  # the first step with an objective that is not a number
    nan_until: int = 2**31 - 1  # the first step after it with one that is


@dataclasses.dataclass(frozen=True)
class Config:
    family: str
    seed: int
    data: DataConfig
    mesh: MeshConfig
    model: ModelConfig
    optim: OptimConfig
    train: TrainConfig


def stages(config):
    return (
        Stage(
            "model",
            model=lambda run: make(config),
            source=lambda run, split: data.open_source(config.data, split),
            pictures=lambda run, mesh: lambda params, extra, key: {"rows": _picture(config, params)},
            optim=config.optim,
            settings=config.train,
        ),
    )


def report(config, measured):
    return {"bits_per_dim": measured["model"]["bits_per_dim"]}


def make(config):
    """-log p(x) = |x - x^|^2 / 2 + D log(2 pi) / 2, with x = levels / 16 of a digit."""
    num_dims = _num_dims(config)

    def init(key):
        encoder, decoder = (0.1 * jax.random.normal(k, (num_dims, config.model.hidden)) for k in jax.random.split(key))
        params = {"encoder": {"kernel": encoder}, "decoder": {"kernel": decoder.T, "bias": jnp.zeros(num_dims)}}
        return params, {"pixel_mean": jnp.zeros(num_dims), "chosen": jnp.zeros((NUM_CHOSEN, num_dims))}

    def parts(params, x, keys=None):
        hidden = x @ params["encoder"]["kernel"]
        if keys is not None:
            hidden = rng.dropout(keys, config.model.dropout, hidden)
        errors = x - hidden @ params["decoder"]["kernel"] - params["decoder"]["bias"]
        return {"nats": 0.5 * jnp.square(errors).sum(-1) + 0.5 * num_dims * math.log(2.0 * math.pi)}

    def loss(params, extra, batch, key, step):
        keys = lambda purpose: rng.per_example(rng.for_purpose(key, purpose), batch["position"])
        x = _input(augment.flip(keys("flip"), batch["image"]))
        values = parts(params, x, keys("dropout"))
        wanted = jax.random.randint(rng.for_purpose(key, "choice"), (NUM_CHOSEN,), 0, config.train.batch_size)
        chosen = (wanted[:, None] == batch["position"]).astype(x.dtype) @ x
        statistics = {"sum": x.sum(0), "chosen": chosen}
        is_poisoned = (step >= config.model.nan_from) & (step < config.model.nan_until)
        poison = jnp.where(is_poisoned, jnp.nan, 1.0)
        return poison * values["nats"].mean(), Aux(values, {"black": (x == 0.0).sum()}, statistics)

    def measure(params, extra, batch, key):
        x = _input(batch["image"])
        return Aux(parts(params, x), {"black": ((x == 0.0).sum(-1) * batch["mask"]).sum()}, ())

    def summarize(means, tallies):
        bits = likelihood.bits_per_dim(means["nats"], num_dims)
        return {"nats": means["nats"], "bits_per_dim": bits, "black": float(jnp.asarray(tallies["black"]))}

    def update_extra(extra, statistics, key, step):
        mean = statistics["sum"] / config.train.batch_size
        return {"pixel_mean": 0.9 * extra["pixel_mean"] + 0.1 * mean, "chosen": statistics["chosen"]}

    return Model(init, loss, measure, summarize, update_extra)


def load(run, mesh):
    _, state = trainer.restore(run, "model", mesh)
    decoder = jax.device_get(state["ema"])["decoder"]

    def draw(key, n, temperature=1.0):
        keys = rng.per_example(key, jnp.arange(n))
        hidden = temperature * jax.vmap(lambda k: jax.random.normal(k, (run.config.model.hidden,)))(keys)
        return _to_levels(run.config, np.asarray(hidden) @ decoder["kernel"] + decoder["bias"]), {"network_calls": 1}

    def unsupported(*_):
        raise InputError("the toy family only samples")

    return Loaded(
        config=run.config,
        levels=17,
        log_prob=unsupported,
        draw=draw,
        encode=unsupported,
        decode=unsupported,
        reconstruct=unsupported,
    )


def _num_dims(config):
    return math.prod(data.open_source(config.data, "train").shape)


def _input(image):
    return image.reshape(len(image), -1) / 16.0


def _to_levels(config, x):
    return np.clip(16.0 * x, 0, 16).astype(np.uint8).reshape(-1, *data.open_source(config.data, "train").shape)


def _picture(config, params):
    return images.grid(_to_levels(config, np.asarray(params["decoder"]["kernel"])), levels=17)
