"""Predictive sampling: exact samples of any autoregressive model over discrete dimensions, in fewer network calls.

With noise eps that is fixed for each sample, x_d = argmax_k(mu_dk(x_<d) + eps_dk) is a deterministic function, and a
call of the network on forecasts evaluates it in all dimensions at once. The outputs are right up to and including the
first dimension whose input was wrong: those are accepted, the rest is forecast anew. Every call accepts at least one
dimension, so D dimensions take at most D calls, none of them to verify; which sample comes out depends on the noise
alone, never on forecasts, batch, lane, window or devices (up to ties within the difference of logits, see `margin`).
Source: Wiggers & Hoogeboom 2020; windows after Song et al. 2021 ("Jacobi-GS"), but for each sample on its own.

The whole loop is one `lax.while_loop` on the device. A lane holds one sample in work; a lane that has finished writes
its sample out and takes the next one.
Not here: the networks (`pixelcnn.py`), forecasts (`forecasters.py`), noise and scores (`gumbel.py`).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from arm_forecast import gumbel
from arm_forecast.forecasters import Call, Forecaster, in_place
from bitsperdim import sharding
from bitsperdim.errors import InputError


class Network(NamedTuple):
    """An autoregressive network over D dimensions of K values, evaluated in windows of w dimensions.

    `init(b)`: the cache of lanes at the start of their samples.
    `call(params, cache, x, start, context)`: float logits [b w k] of the dimensions start .. start + w - 1 of every
    lane, whatever forecasters should see (`hidden`), and `pending`, from which the next cache can be made. The logits
    of dimension d depend on x_<d alone; what lies before the window may be taken from the cache or read from x.
    `advance(pending, shift)`: the cache for windows that begin `shift` strides later, each lane its own.

    All leaves of caches, pending and context have the lane as their leading axis. Of the inputs of a call the engine
    vouches for those before the new window, except the very last: dimension `new start - 1` may have been a wrong
    forecast, corrected since. So what `advance` hands on must not depend on that input; read it from x, which always
    holds the accepted values. Activations that are strictly causal are safe.
    """

    num_dims: int
    num_values: int
    window: int
    stride: int
    init: Callable[[int], PyTree]
    call: Callable[
        [PyTree, PyTree, Int[Array, "b d"], Int[Array, " b"], PyTree], tuple[Float[Array, "b w k"], PyTree, PyTree]
    ]
    advance: Callable[[PyTree, Int[Array, " b"]], PyTree]


def whole(
    function: Callable[[PyTree, Int[Array, "b d"], PyTree], tuple[Float[Array, "b d k"], PyTree]],
    num_dims: int,
    num_values: int,
) -> Network:
    """A network that evaluates all dimensions in every call: `function(params, x, context) -> logits, hidden`."""

    def call(params, cache, x, start, context):
        return *function(params, x, context), ()

    return Network(num_dims, num_values, num_dims, num_dims, lambda batch: (), call, lambda pending, shift: ())


class Samples(NamedTuple):
    """Samples of ids first_id .. first_id + n - 1, and what they took.

    `call_of`: the call, counted from 1 in each sample, in which a dimension was accepted; 0 for given dimensions that
    come before the first free one. `calls`: network calls of a sample; in a windowed network with a given prefix also
    those that only carry the cache over it. `margin`: the smallest of all free dimensions, of how far the best score is
    ahead and the edges of top-k and nucleus from changing the choice (`gumbel.best`): a program whose logits differ by
    less than half of it draws the same sample. `log_prob`: log probability of the free dimensions, each given all
    before it, under the unmodified logits (temperature 1, all values), in nats. `network_calls`: evaluations of the
    whole batch of lanes.
    """

    x: Int[Array, "n d"]
    call_of: Int[Array, "n d"]
    calls: Int[Array, " n"]
    margin: Float[Array, " n"]
    log_prob: Float[Array, " n"]
    network_calls: Int[Array, ""]


class _Plan(NamedTuple):
    """What is fixed when the sampler is compiled."""

    network: Network
    forecaster: Forecaster
    num_samples: int
    batch: int
    refill: bool
    fresh_noise: bool
    top_k: int
    top_p: float
    noise: Callable[[PyTree], gumbel.Noise]
    mesh: Mesh | None


class _Job(NamedTuple):
    """What the samples are drawn from. Leading axes are n, or 1 for all samples alike; context's is n."""

    params: PyTree
    key: PyTree
    context: PyTree
    given: Int[Array, "_ d"]
    init: Int[Array, "_ d"]
    first_id: Int[Array, ""]
    count: Int[Array, ""]
    temperature: Float[Array, ""]


class _Lanes(NamedTuple):
    """The samples in work. A lane with row = n is idle; its frontier is D or was never looked at."""

    row: Int[Array, " b"]
    x: Int[Array, "b d"]  # accepted dimensions, then forecasts
    given: Int[Array, "b d"]
    frontier: Int[Array, " b"]  # the first dimension that is neither accepted nor given
    start: Int[Array, " b"]  # of the window
    calls: Int[Array, " b"]
    call_of: Int[Array, "b d"]
    margin: Float[Array, " b"]
    log_prob: Float[Array, " b"]
    cache: PyTree
    forecasts: PyTree  # the forecaster's state
    context: PyTree


class _Progress(NamedTuple):
    lanes: _Lanes
    next_row: Int[Array, ""]
    samples: Samples


def sampler(
    network: Network,
    forecaster: Forecaster,
    num_samples: int,
    batch: int,
    *,
    refill: bool = True,
    fresh_noise: bool = False,
    top_k: int = 0,
    top_p: float = 1.0,
    noise: Callable[[PyTree], gumbel.Noise] | None = None,
    mesh: Mesh | None = None,
) -> Callable[..., Samples]:
    """draw(params, key, ...) -> `num_samples` samples, `batch` of them at a time; compiled once.

    `refill=False` lets finished lanes wait for the slowest of their batch (for comparison). `fresh_noise=True` redraws
    the noise in every call: the same law, other samples, more calls (the paper's ablation). `top_k`, `top_p` restrict
    the values as in `gumbel.restrict`. `noise(key)` replaces the source of noise. With a `mesh` lanes are spread over
    its devices, and `batch` is rounded up to a multiple of them; params and context must be placed on it, or not
    committed to any device.

    `draw` takes params (of the network and of the forecaster) as arrays of the compiled function, not as constants in
    it. `context` has the sample as its leading axis; each lane is called with its sample's rows. `given`: known values,
    -1 where free. A given prefix is conditioned on exactly; given dimensions with free ones before them (holes) are
    clamped, what is free before them is drawn without regard to them. `init`: the forecasts before the first call.
    Both for each sample, or [d] for all. `first_id`: the samples' noise is that of ids first_id, first_id + 1, ...
    `count`: only so many of them are drawn, the others are zeros.
    `temperature`: of the scores; 0 is greedy.
    """
    _check_sizes(network, num_samples, batch)
    gumbel.check_options(1.0, top_k, top_p)
    batch = batch if mesh is None else sharding.whole_batch(batch, mesh)
    noise = noise or (lambda key: gumbel.noise(key, network.num_values))
    plan = _Plan(network, forecaster, num_samples, batch, refill, fresh_noise, top_k, top_p, noise, mesh)
    run = jax.jit(lambda job: _run(plan, job))

    def draw(
        params: PyTree,
        key: PyTree,
        *,
        context: PyTree = None,
        given: ArrayLike | None = None,
        init: ArrayLike = 0,
        first_id: int | Int[Array, ""] = 0,
        count: int | Int[Array, ""] | None = None,
        temperature: float | Float[Array, ""] = 1.0,
    ) -> Samples:
        gumbel.check_options(temperature, top_k, top_p)
        for leaf in jax.tree.leaves(context):
            if jnp.shape(leaf)[:1] != (num_samples,):
                raise InputError(f"context must hold {num_samples} rows, one a sample; not the shape {jnp.shape(leaf)}")
        sizes = num_samples, network.num_dims, network.num_values
        known = check_values(-1 if given is None else given, "given", -1, sizes)
        first = check_values(init, "init", 0, sizes)
        numbers = jnp.int32(first_id), jnp.minimum(num_samples, num_samples if count is None else count)
        return run(_Job(params, key, context, known, first, *numbers, jnp.float32(temperature)))

    return draw


def trace(call_of: ArrayLike) -> Int[np.ndarray, "n calls"]:
    """How many dimensions are accepted after call 1, 2, ... of the sample that took most; -1 after a sample's last."""
    call_of = np.asarray(call_of)
    count = np.arange(1, call_of.max(initial=0) + 1)
    # Dimensions are accepted in order, so the calls of a sample are sorted.
    rows = [np.where(count <= calls[-1], np.searchsorted(calls, count, side="right"), -1) for calls in call_of]
    return np.array(rows, np.int32).reshape(len(call_of), len(count))


def mistakes(call_of: ArrayLike, given: ArrayLike | None = None) -> Bool[Array, "n d"]:
    """Where the forecast was wrong: free dimensions after which the next free one had to wait for another call.

    With a network in windows the last dimension of a window that was accepted whole counts as well; the sample's last
    free dimension never does.
    """
    call_of = jnp.asarray(call_of)
    free = jnp.ones(call_of.shape, bool) if given is None else jnp.asarray(given) < 0
    never = jnp.iinfo(call_of.dtype).max
    following = jax.lax.cummin(jnp.where(free, call_of, never), axis=call_of.ndim - 1, reverse=True)
    following = jnp.pad(following[..., 1:], [(0, 0)] * (call_of.ndim - 1) + [(0, 1)], constant_values=never)
    return free & (following > call_of) & (following < never)


# --- The loop ---------------------------------------------------------------------------------------------------------


def _run(plan: _Plan, job: _Job) -> Samples:
    count, num_dims = plan.num_samples, plan.network.num_dims
    row = jnp.arange(plan.batch, dtype=jnp.int32)
    row = jnp.where(row < job.count, row, count)
    zeros, real = jnp.zeros((count, num_dims), jnp.int32), jnp.zeros(count, jnp.float32)
    samples = Samples(zeros, zeros, jnp.zeros(count, jnp.int32), real, real, jnp.int32(0))
    progress = _Progress(_begin(plan, job, row), jnp.minimum(plan.batch, job.count), samples)

    def step(progress: _Progress) -> _Progress:
        lanes = _call(plan, job, progress.lanes)
        samples = progress.samples._replace(network_calls=progress.samples.network_calls + 1)
        finished = (lanes.row < count) & (lanes.frontier >= num_dims)
        progress = progress._replace(lanes=lanes, samples=samples)
        settle = lambda progress: _refill(plan, job, _write(plan, progress, finished))
        return _placed(plan, jax.lax.cond(finished.any(), settle, lambda progress: progress, progress))

    unfinished = lambda progress: (progress.lanes.row < count).any()
    return jax.lax.while_loop(unfinished, step, _placed(plan, progress)).samples


def _begin(plan: _Plan, job: _Job, row: Int[Array, " b"]) -> _Lanes:
    """Lanes at the start of the samples `row`."""
    take = lambda rows: rows[jnp.minimum(row, rows.shape[0] - 1)]
    given = take(job.given)
    zero = jnp.zeros_like(row)
    return _Lanes(
        row=row,
        x=jnp.where(given < 0, take(job.init), given),
        given=given,
        frontier=_first(given < 0),
        start=zero,
        calls=zero,
        call_of=jnp.zeros_like(given),
        margin=jnp.full(row.shape, jnp.inf, jnp.float32),
        log_prob=jnp.zeros(row.shape, jnp.float32),
        cache=plan.network.init(plan.batch),
        forecasts=plan.forecaster.init(plan.batch),
        context=jax.tree.map(take, job.context),
    )


def _call(plan: _Plan, job: _Job, lanes: _Lanes) -> _Lanes:
    """One network call: evaluate, accept, forecast, move the windows."""
    network = plan.network
    logits, hidden, pending = network.call(job.params, lanes.cache, lanes.x, lanes.start, lanes.context)
    logits = logits.astype(jnp.float32)
    dims = lanes.start[:, None] + jnp.arange(network.window)
    noise = _noise(plan, job, lanes)
    choose = lambda logits, dims: gumbel.best(logits, noise(dims), job.temperature, plan.top_k, plan.top_p)
    best, margin = choose(logits, dims)

    every = jnp.arange(network.num_dims)
    free = (lanes.given < 0) & (every >= lanes.frontier[:, None])
    outputs = jnp.where(free, in_place(best, lanes.start, lanes.x), lanes.x)
    right, frontier = _accept(plan, lanes, free & ((outputs != lanes.x) | (not plan.forecaster.trusted)))
    passed = (every >= lanes.frontier[:, None]) & (every < frontier[:, None])
    fresh = jnp.take_along_axis(passed & free, dims, 1)
    log_prob = jnp.take_along_axis(logits, best[..., None], -1)[..., 0] - jax.nn.logsumexp(logits, -1)

    draw = lambda logits, dims: choose(logits.astype(jnp.float32), dims)[0]
    ids = job.first_id + lanes.row
    call = Call(ids, lanes.x, outputs, passed & free, frontier, lanes.start, logits, hidden, noise, draw)
    forecast, forecasts = plan.forecaster.forecast(job.params, call, lanes.forecasts)
    start = jnp.minimum(right // network.stride * network.stride, network.num_dims - network.window)
    calls = lanes.calls + (lanes.frontier < network.num_dims)
    return lanes._replace(
        x=jnp.where((lanes.given < 0) & (every >= frontier[:, None]), forecast.astype(jnp.int32), outputs),
        frontier=frontier,
        start=start,
        calls=calls,
        call_of=jnp.where(passed, calls[:, None], lanes.call_of),
        margin=jnp.minimum(lanes.margin, jnp.where(fresh, margin, jnp.inf).min(1)),
        log_prob=lanes.log_prob + jnp.where(fresh, log_prob, 0.0).sum(1),
        cache=network.advance(pending, (start - lanes.start) // network.stride),
        forecasts=forecasts,
    )


def _noise(plan: _Plan, job: _Job, lanes: _Lanes) -> Callable[[Int[Array, "b t"]], Float[Array, "b t k"]]:
    """eps of each lane's sample at any dimensions."""
    source, ids = plan.noise(job.key), job.first_id + lanes.row
    return lambda dims: source(ids, dims, lanes.calls) if plan.fresh_noise else source(ids, dims)


def _accept(plan: _Plan, lanes: _Lanes, wrong: Bool[Array, "b d"]) -> tuple[Int[Array, " b"], Int[Array, " b"]]:
    """How far the outputs are right, and the new frontier.

    They are right up to and including the first wrong input from the old frontier on, within the window. Then given
    dimensions need no output; but they were evaluated after a wrong input, so the next window may not begin past them.
    A frontier beyond the window is reached call by call.
    """
    right = jnp.minimum(_first(wrong) + 1, lanes.start + plan.network.window)
    every = jnp.arange(plan.network.num_dims)
    return right, _first((lanes.given < 0) & (every >= jnp.maximum(right, lanes.frontier)[:, None]))


def _write(plan: _Plan, progress: _Progress, finished: Bool[Array, " b"]) -> _Progress:
    """Finished lanes write their samples out and become idle."""
    lanes, samples = progress.lanes, progress.samples
    row = jnp.where(finished, lanes.row, plan.num_samples)
    put = lambda into, values: into.at[row].set(values, mode="drop")
    names = ("x", "call_of", "calls", "margin", "log_prob")
    samples = samples._replace(**{name: put(getattr(samples, name), getattr(lanes, name)) for name in names})
    lanes = lanes._replace(row=jnp.where(finished, plan.num_samples, lanes.row))
    return progress._replace(lanes=lanes, samples=samples)


def _refill(plan: _Plan, job: _Job, progress: _Progress) -> _Progress:
    """Idle lanes take the next samples, as far as there are any. Without refilling they wait until all are idle."""
    if plan.batch >= plan.num_samples:
        return progress
    lanes, next_row = progress.lanes, progress.next_row
    idle = lanes.row == plan.num_samples
    taking = idle if plan.refill else idle & idle.all()
    row = next_row + jnp.cumsum(taking, dtype=jnp.int32) - 1
    taking &= row < job.count
    begun = _begin(plan, job, jnp.where(taking, row, plan.num_samples))
    choose = lambda new, old: jnp.where(taking.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)
    return progress._replace(lanes=jax.tree.map(choose, begun, lanes), next_row=next_row + taking.sum(dtype=jnp.int32))


def _placed(plan: _Plan, progress: _Progress) -> _Progress:
    """Lanes over the devices, what they share on each of them."""
    if plan.mesh is None:
        return progress
    lanes = jax.lax.with_sharding_constraint(progress.lanes, sharding.over_batch(plan.mesh))
    shared = jax.lax.with_sharding_constraint(progress._replace(lanes=()), sharding.replicated(plan.mesh))
    return shared._replace(lanes=lanes)


def _first(where: Bool[Array, "b d"]) -> Int[Array, " b"]:
    """The first dimension for which it holds, D for none."""
    num_dims = where.shape[1]
    return jnp.where(where, jnp.arange(num_dims, dtype=jnp.int32), num_dims).min(1)


# --- Checks of what is given ------------------------------------------------------------------------------------------


def _check_sizes(network: Network, num_samples: int, batch: int) -> None:
    """Raises InputError for numbers of the caller's, ValueError for windows that a network cannot have."""
    for name, value in (("num_samples", num_samples), ("batch", batch)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    num_dims, window, stride = network.num_dims, network.window, network.stride
    # A window shorter than a stride might not contain the frontier.
    if not 1 <= stride <= window <= num_dims or (num_dims - window) % stride:
        raise ValueError(
            f"windows must be at least a stride and at most {num_dims} dimensions long and end with them; "
            f"not windows of {window} at multiples of {stride}"
        )


def check_values(values: ArrayLike, name: str, lowest: int, sizes: tuple[int, int, int]) -> Int[Array, "_ d"]:
    """[n d], or [1 d] for all samples alike; InputError for other shapes and for what is no value.

    `sizes`: the numbers of samples, of dimensions and of values.
    """
    num_samples, num_dims, num_values = sizes
    shape = jnp.shape(values)
    if shape not in ((), (num_dims,), (1, num_dims), (num_samples, num_dims)):
        raise InputError(
            f"{name} must have the shape [{num_samples}, {num_dims}], or [{num_dims}] for all samples, not {shape}"
        )
    if not isinstance(values, Tracer):
        host = np.asarray(values)
        if host.dtype.kind not in "iu" or host.min() < lowest or host.max() >= num_values:
            found = f"{host.dtype} from {host.min()} to {host.max()}"
            raise InputError(f"{name} must hold whole numbers from {lowest} to {num_values - 1}, not {found}")
    values = jnp.asarray(values, jnp.int32)
    return values if values.ndim == 2 else jnp.broadcast_to(values, (1, num_dims))
