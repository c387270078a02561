"""The core of a very deep VAE: bottom-up through the image, top-down through the latents, for both styles of blocks.

Source: Efficient-VDVAE, figures 4 and 5, eq. 3 and 4. A top-down layer computes its prior and posterior from the stream
y, draws z, and puts y + residual + projection(z) through a residual block; information of the image comes in through z
alone. Where each layer's z comes from is an argument (`Source`), so training, sampling, reconstruction and decoding are
one pass. Not here: the blocks (`efficient.py`, `baseline.py`), distributions (`latents.py`, `outputs.py`) and the loss.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from vdvae import baseline, efficient, latents, layers, levels
from vdvae.blocks import Blocks
from vdvae.config import ModelConfig
from vdvae.latents import Latent
from vdvae.layers import Arithmetic, Params
from vdvae.levels import Level


class Source(NamedTuple):
    """Where the z of one layer comes from. What is None is not used; noise may be given or, as keys, drawn.

    Known: `given`, else a draw from the posterior where it has `noise`. Free: a draw from the prior where it has
    `prior_noise`. With both, z = mask known + (1 - mask) free.
    """

    noise: Array | None = None  # [b, h, w, z] or the keys of the examples [b]
    prior_noise: Array | None = None  # independent of it
    temperature: Array | None = None  # of the prior's draw; None: 1
    given: Array | None = None  # [b, h, w, z]
    mask: Array | None = None  # broadcasts to z: 1 known, 0 free


class Draw(NamedTuple):
    """What a layer did: its latents and, where the image was seen, its posterior and divergence."""

    z: Float[Array, "b h w z"]
    prior: Any
    posterior: Any  # None where z needs none
    kl: Float[Array, "b h w z"] | None  # of each element, in nats


class Network(NamedTuple):
    """A hierarchy for images of one shape. Parameters: {'ends', 'bottom_up': {'level_0', ...}, 'top_down': ...}."""

    levels: tuple[Level, ...]
    blocks: Blocks
    latent: Latent
    arithmetic: Arithmetic
    scans: bool
    remat: int
    table: Params


Keep = Callable[[Draw], PyTree]  # what of each layer outlives it; sums, where maps would not fit into memory


def make(config: ModelConfig, shape: tuple[int, int, int], outputs: int) -> Network:
    """The network for images of `shape` with as many outputs a pixel."""
    found, latent = levels.levels(config, shape), latents.make(config)
    style = {"efficient": efficient.blocks, "vdvae": baseline.blocks}[config.style]
    blocks = style(config, found, latent.numbers)
    numbers = range(len(found))
    table = {
        "ends": blocks.ends_table(found, shape[-1], outputs),
        "bottom_up": {f"level_{i}": blocks.bottom_up_table(found, i) for i in numbers},
        "top_down": {f"level_{i}": blocks.top_down_table(found, i) for i in numbers},
    }
    arithmetic = Arithmetic(jnp.dtype(config.dtype), config.precision)
    return Network(found, blocks, latent, arithmetic, config.scan, config.remat, table)


def posterior_sources(keys: Key[Array, " b"], num_layers: int) -> list[Source]:
    """z from the posterior in every layer, its noise from the keys of the examples."""
    return [Source(noise=_of_layer(keys, layer)) for layer in range(num_layers)]


def prior_sources(keys: Key[Array, " b"], temperatures: Sequence[Array | float]) -> list[Source]:
    """z from the prior in every layer, with a temperature for each."""
    return [
        Source(prior_noise=_of_layer(keys, layer), temperature=jnp.asarray(temperature, jnp.float32))
        for layer, temperature in enumerate(temperatures)
    ]


def _of_layer(keys: Key[Array, " b"], layer: int) -> Key[Array, " b"]:
    return jax.vmap(lambda key: jax.random.fold_in(key, layer))(keys)


def bottom_up(net: Network, params: Params, x: Float[Array, "b h w c"]) -> list[list[Array]]:
    """For each level, deepest first, the skip connections of its layers in the order in which those run."""
    y = net.blocks.read(params["ends"], x, net.arithmetic)
    found: list[list[Array]] = []
    for i in reversed(range(len(net.levels))):
        level, of_level = net.levels[i], params["bottom_up"][f"level_{i}"]
        y, skips = _climb(net, of_level, y, level)
        found.append(skips[::-1])
        if i > 0:
            pool = lambda of_level, y, i=i: net.blocks.pool(of_level, y, net.levels, i, net.arithmetic)
            y = _rematerialised(net, level, pool)(of_level, y)
    return found[::-1]


def _climb(net: Network, of_level: Params, y: Array, level: Level) -> tuple[Array, list[Array]]:
    """The blocks of a level; a skip connection leaves behind each of the last ones, the finest first."""

    def step(y: Array, params: tuple[Params, Params | None]) -> tuple[Array, Array | None]:
        y = net.blocks.block(params[0], y, net.arithmetic)
        return y, None if params[1] is None else net.blocks.skip(params[1], y, net.arithmetic)

    projects = "skips" in of_level
    plain = level.blocks - level.skips if projects else level.blocks
    y, _ = _run(net, level, step, y, _slice(of_level.get("blocks"), 0, plain), None, plain)
    if not projects:  # one skip connection: the stream itself
        return y, [net.blocks.skip(None, y, net.arithmetic)] if level.layers else []
    both = _slice(of_level["blocks"], plain, level.blocks)
    return _run(net, level, step, y, both, of_level["skips"], level.skips)


def top_down(
    net: Network, params: Params, skips: list[list[Array]] | None, sources: Sequence[Source], keep: Keep
) -> tuple[Float[Array, "b h w o"], list[PyTree]]:
    """The outputs of the last convolution, for the padded image, and `keep` of what each layer did, in their order.

    `skips` of `bottom_up` are needed where a source draws from a posterior; layers that do not evaluate none.
    """
    y = net.blocks.start(params["ends"], _batch(sources[0]), net.levels, net.arithmetic)
    kept: list[PyTree] = []
    for i, level in enumerate(net.levels):
        of_level = params["top_down"][f"level_{i}"]
        enter = lambda of_level, y, i=i: net.blocks.enter(of_level, y, net.levels, i, net.arithmetic)
        y = _rematerialised(net, level, enter)(of_level, y)
        if not level.layers:
            y = net.blocks.block(of_level["block"], y, net.arithmetic)
            continue
        of_layers = list(sources[len(kept) : len(kept) + level.layers])
        y, drawn = _descend(net, of_level["layers"], y, level, skips[i] if skips else None, of_layers, keep)
        kept += drawn
    return net.blocks.write(params["ends"], y, net.arithmetic), kept


def _batch(source: Source) -> int:
    """Examples, by what the first layer is given."""
    return next(len(x) for x in (source.given, source.noise, source.prior_noise) if x is not None)


def _descend(
    net: Network,
    params: Params,
    y: Array,
    level: Level,
    skips: list[Array] | None,
    sources: list[Source],
    keep: Keep,
) -> tuple[Array, list[PyTree]]:
    """The layers of a level, in runs of those that are alike: the same kinds of source, and a skip connection each of
    their own, or all the same one."""
    is_shared = lambda layer: len(level.sharing) > 1 and layer in level.sharing
    kept: list[PyTree] = []
    first = 0
    while first < level.layers:
        needs_skip = _needs_posterior(sources[first])
        last = first + 1
        while last < level.layers and _alike(sources[first], sources[last]):
            if needs_skip and is_shared(first) != is_shared(last):
                break
            last += 1
        shared = skips[level.shared] if needs_skip and skips and is_shared(first) else None
        each = None
        if needs_skip and skips and shared is None:
            each = [skips[level.skip_of(layer)] for layer in range(first, last)]

        def step(y: Array, inputs: tuple[Params, tuple[Source, Array | None]], shared=shared) -> tuple[Array, PyTree]:
            of_layer, (source, skip) = inputs
            y, draw = _layer(net, of_layer, y, shared if skip is None else skip, source)
            return y, keep(draw)

        alike = sources[first:last]
        if not net.scans:
            alike = _drawn_at_once(net, alike, (level.height, level.columns, level.latent))
        inputs = [(source, None if each is None else each[k]) for k, source in enumerate(alike)]
        y, drawn = _run(net, level, step, y, _slice(params, first, last), inputs, last - first)
        kept += drawn
        first = last
    return y, kept


def _layer(net: Network, params: Params, y: Array, skip: Array | None, source: Source) -> tuple[Array, Draw]:
    """One layer: prior and posterior from y, then z, then the block (figure 5c)."""
    latent = params["z_projection"]["kernel"].shape[-2]
    numbers, residual = net.blocks.prior(params, y, latent, net.arithmetic)
    prior = net.latent.prior(numbers)
    posterior = kl = None
    if _needs_posterior(source):
        assert skip is not None, "a posterior needs the skip connections of bottom_up"
        posterior = net.latent.posterior(net.blocks.posterior(params, y, skip, latent, net.arithmetic), prior)
        kl = net.latent.kl(posterior, prior)
    z = _drawn(net, (*y.shape[1:3], latent), prior, posterior, source)
    y = y + residual + layers.conv(params["z_projection"], z, net.arithmetic)
    return net.blocks.block(params, y, net.arithmetic), Draw(z, prior, posterior, kl)


def _drawn(net: Network, shape: tuple[int, ...], prior: Any, posterior: Any, source: Source) -> Array:
    """z as the source says; `shape` is that of one example."""
    noise = lambda given: jax.vmap(lambda key: net.latent.noise(key, shape))(given) if _is_keys(given) else given
    known = source.given
    if known is None and source.noise is not None:
        known = net.latent.draw(posterior, noise(source.noise), 1.0)
    if source.prior_noise is None:
        assert known is not None, "a source must say where z comes from"
        return known
    # The two noises of one layer come from different keys, or masked reconstruction would look better than it is.
    temperature = 1.0 if source.temperature is None else source.temperature
    free = net.latent.draw(prior, noise(source.prior_noise), temperature)
    if known is None:
        return free
    assert source.mask is not None, "a source with known and free latents needs a mask"
    return source.mask * known + (1.0 - source.mask) * free


def _drawn_at_once(net: Network, sources: list[Source], shape: tuple[int, ...]) -> list[Source]:
    """The sources of like layers with their noise instead of its keys. XLA's CPU backend takes two seconds to compile
    each place where numbers are drawn, and most of a network's time at that."""
    for name in ("noise", "prior_noise"):
        keys = [getattr(source, name) for source in sources]
        if keys[0] is not None and _is_keys(keys[0]):
            drawn = jax.vmap(jax.vmap(lambda key: net.latent.noise(key, shape)))(jnp.stack(keys))
            sources = [source._replace(**{name: drawn[k]}) for k, source in enumerate(sources)]
    return sources


def _is_keys(noise: Array) -> bool:
    return jnp.issubdtype(noise.dtype, jax.dtypes.prng_key)


def _needs_posterior(source: Source) -> bool:
    return source.noise is not None


def _alike(one: Source, other: Source) -> bool:
    """May both run in one loop."""
    kinds = lambda source: [None if x is None else (x.shape, x.dtype) for x in source]
    return kinds(one) == kinds(other)


def _run(
    net: Network, level: Level, step: Callable, y: Array, params: PyTree, inputs: Any, count: int
) -> tuple[Array, list[PyTree]]:
    """y <- step(y, (parameters of layer k, inputs of layer k)) for each of `count` layers, in one loop or unrolled.

    `inputs` is a list, one for each layer, or a tree with a leading axis as the parameters have it, or None.
    """
    if count == 0:
        return y, []
    step = _rematerialised(net, level, step)
    is_listed = isinstance(inputs, list)
    if net.scans and count > 1:
        stack = lambda *leaves: jnp.stack(leaves)
        given = jax.tree.map(stack, *inputs) if is_listed else inputs
        y, kept = jax.lax.scan(step, y, (params, given))
        return y, [jax.tree.map(lambda leaf, k=k: leaf[k], kept) for k in range(count)]
    each = inputs if is_listed else [None] * count if inputs is None else layers.unstacked(inputs, count)
    kept = []
    for of_layer, given in zip(layers.unstacked(params, count), each, strict=True):
        y, value = step(y, (of_layer, given))
        kept.append(value)
    return y, kept


def _rematerialised(net: Network, level: Level, function: Callable) -> Callable:
    """Computed again in the backward pass, where the level is as large as the config says."""
    if not net.remat or max(level.height, level.columns) < net.remat:
        return function
    return jax.checkpoint(function, prevent_cse=not net.scans)


def _slice(params: PyTree, first: int, last: int) -> PyTree:
    """Layers first .. last - 1 of stacked parameters."""
    return jax.tree.map(lambda leaf: leaf if (first, last) == (0, len(leaf)) else leaf[first:last], params)
