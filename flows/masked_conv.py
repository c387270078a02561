"""The masked convolution of MaCow: an autoregressive bijector over whole rows, or columns, of an image.

Source: Ma et al. 2019 (MaCow), as its released code has it. Nothing is masked: a shifted convolution never sees the
current line, so that all pixels of a line are transformed at once. The four orders are one routine on turned images:
A sees the rows above, B the rows below, C the columns to the left, D the columns to the right. Kernels are kept as
those of A, [lines, across, c, d], tap 0 the line furthest away.
Not here: how the released code lays out its kernels (`convert.py`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from flows import convolution, transform
from flows.bijector import Bijector, Condition, LogDet

ORDERS = ("A", "B", "C", "D")
INVERSES = ("lines", "fixed_point")
CONDITION_KERNEL = (3, 3)


def masked_conv(
    order: str,
    channels: int,
    kernel: tuple[int, int] = (2, 3),
    affine: bool = True,
    condition_channels: int = 0,
    inverse: str = "lines",
) -> Bijector:
    """y = sigma x + mu (or x + mu), with mu and sigma of a line from the `kernel[0]` lines before it.

    The net is shifted convolution (+ 3x3 convolution of the condition) -> ELU -> 1x1, weight-normalised, with
    h = 4 C hidden channels, beyond 96 channels min(2 C, 512). `kernel` is (lines, across), across odd. The inverse is
    exact either way:

    lines         one line after another, from a window of the lines before it: as many small steps as lines
    fixed_point   x <- (y - mu(x)) / sigma(x) for all lines at once until nothing changes. Line i is right after i + 1
                  turns at the latest, whatever the others held till then, so turns end with the number of lines
    """
    hidden = hidden_channels(channels)
    outputs = transform.num_outputs(channels, affine)

    def init(key: Key[Array, ""]) -> PyTree:
        keys = jax.random.split(key, 3)
        found = {"conv": convolution.init(keys[0], kernel, channels, hidden)}
        found["conv1x1"] = convolution.init(keys[1], (1, 1), hidden, outputs)
        if condition_channels:
            found["condition"] = convolution.init(keys[2], CONDITION_KERNEL, condition_channels, hidden)
        return found

    def forward(params: PyTree, x: Array, condition: Condition) -> tuple[Array, LogDet]:
        y, log_det = transform.forward(
            _net(params, oriented(x, order), _bias(params, condition, order)), oriented(x, order)
        )
        return restored(y, order), log_det

    def inverted(params: PyTree, y: Array, condition: Condition) -> tuple[Array, LogDet]:
        solve = {"lines": by_lines, "fixed_point": by_fixed_point}[inverse]
        x, log_det = solve(convolution.effective(params), oriented(y, order), _bias(params, condition, order))
        return restored(x, order), log_det

    def init_from_batch(params: PyTree, x: Array, condition: Condition) -> tuple[PyTree, Array]:
        seen = _shifted_conv(oriented(x, order), convolution.effective(params["conv"]))
        found = {"conv": convolution.standardised(params["conv"], seen)}
        if condition is not None:
            found["condition"] = convolution.standardised(
                params["condition"], convolution.apply(params["condition"], condition)
            )
        found |= {"conv1x1": convolution.zeroed(params["conv1x1"])}
        return found, forward(found, x, condition)[0]

    return Bijector(init, forward, inverted, init_from_batch)


def hidden_channels(channels: int) -> int:
    return 4 * channels if channels <= 96 else min(2 * channels, 512)


def oriented(x: Float[Array, "b h w c"], order: str) -> Float[Array, "b lines across c"]:
    """The image turned so that its lines come from top to bottom."""
    x = x.transpose(0, 2, 1, 3) if order in "CD" else x
    return x[:, ::-1] if order in "BD" else x


def restored(x: Float[Array, "b lines across c"], order: str) -> Float[Array, "b h w c"]:
    """The inverse of `oriented`."""
    x = x[:, ::-1] if order in "BD" else x
    return x.transpose(0, 2, 1, 3) if order in "CD" else x


def by_lines(
    params: PyTree, y: Float[Array, "b h w c"], bias: Float[Array, "b h w d"] | None
) -> tuple[Float[Array, "b h w c"], LogDet]:
    """The inverse, line by line in one compiled loop that carries the window of the last lines."""
    batch, _, across, channels = y.shape
    kernel = params["conv"]["kernel"]
    height, width = kernel.shape[:2]
    flat = kernel.reshape(-1, kernel.shape[-1])
    head = params["conv1x1"]["kernel"][0, 0]

    def step(
        window: tuple[Array, ...], line: tuple[Array, Array | None]
    ) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
        own, own_bias = line
        taps = [padded[:, k : k + across] for padded in window for k in range(width)]
        h = convolution.matmul(jnp.concatenate(taps, -1), flat) + params["conv"]["bias"]
        h = h if own_bias is None else h + own_bias
        net = convolution.matmul(jax.nn.elu(h), head) + params["conv1x1"]["bias"]
        x, log_det = transform.inverse(net, own)
        return (*window[1:], _padded(x, width)), (x, log_det)

    empty = jnp.zeros((batch, across + width - 1, channels), y.dtype)
    by_line = jax.tree.map(lambda image: image.swapaxes(0, 1), (y, bias))
    _, (x, log_dets) = jax.lax.scan(step, (empty,) * height, by_line)
    return x.swapaxes(0, 1), log_dets.sum(0)


def by_fixed_point(
    params: PyTree, y: Float[Array, "b h w c"], bias: Float[Array, "b h w d"] | None
) -> tuple[Float[Array, "b h w c"], LogDet]:
    """The inverse as the fixed point of x <- (y - mu(x)) / sigma(x)."""
    x, _ = fixed_point(lambda x: transform.inverse(_net(params, x, bias), y)[0], y, y.shape[1])
    # A pass of its own: within the loop it would be computed at every turn.
    return x, transform.inverse(_net(params, x, bias), y)[1]


def fixed_point(turn: Callable[[Array], Array], start: Array, most: int) -> tuple[Array, Array]:
    """turn(turn(... start)) until nothing changes, at most `most` times; and the number of turns."""

    def goes_on(state: tuple[Array, Array, Array]) -> Array:
        turns, before, now = state
        return (turns < most) & (before != now).any()

    def once(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        turns, _, now = state
        return turns + 1, now, turn(now)

    turns, _, x = jax.lax.while_loop(goes_on, once, (jnp.int32(1), start, turn(start)))
    return x, turns


def _net(params: PyTree, x: Float[Array, "b h w c"], bias: Float[Array, "b h w d"] | None) -> Float[Array, "b h w e"]:
    h = _shifted_conv(x, convolution.effective(params["conv"]))
    return convolution.apply(params["conv1x1"], jax.nn.elu(h if bias is None else h + bias))


def _bias(params: PyTree, condition: Condition, order: str) -> Float[Array, "b h w d"] | None:
    """What the condition adds to the hidden channels, computed once for all lines."""
    return None if condition is None else oriented(convolution.apply(params["condition"], condition), order)


def _shifted_conv(x: Float[Array, "b h w c"], params: convolution.Params) -> Float[Array, "b h w d"]:
    """Line i sees lines i - kh ... i - 1: the shared convolution, with one line more above and one fewer below."""
    height, width = params["kernel"].shape[:2]
    return convolution.convolve(x, params["kernel"], (height, width // 2)) + params["bias"]


def _padded(line: Float[Array, "b w c"], width: int) -> Float[Array, "b v c"]:
    return jnp.pad(line, ((0, 0), (width // 2, width // 2), (0, 0)))
