"""Stages `pairs` and `modules`: forecasting modules trained afterwards, on a frozen ARM and samples of its own.

A pair is a sample and the noise it was drawn with. The noise is a function of (seed, sample, dimension), so only the
samples are kept, and the noise is made again where a module asks for it: it is exact, no posterior of anything.
Source: Wiggers & Hoogeboom 2020, supplement B, first paragraph. Training with the ARM, on data: `arm_stage.py`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree

from arm_forecast import facts, gumbel, modules, networks, pictures, pixelcnn, samplers
from arm_forecast.config import Config
from arm_forecast.samplers import Sampler
from bitsperdim import extracted, hosts, sharding, trainer
from bitsperdim.errors import InputError
from bitsperdim.model import Aux, Batch, Model, Pictures, Stage
from bitsperdim.run import Run
from bitsperdim.sources import Source

PAIRS = extracted.Extraction("pairs", of="arm", then=("modules",))


def pairs(config: Config) -> Stage:
    return Stage(
        "pairs",
        needs=("arm",),
        extract=_extract,
        is_extracted=lambda run: extracted.is_extracted(run, PAIRS),
    )


def stage(config: Config) -> Stage:
    """The stage `modules`, on the pairs of the one before."""
    assert config.modules is not None
    return Stage(
        "modules",
        needs=("arm", "pairs"),
        model=make,
        source=_source,
        example=_example,
        begin=_trained_arm,
        pictures=_pictures,
        optim=config.modules.optim,
        settings=config.modules.train,
    )


def _sizes(run: Run) -> dict[str, int]:
    return {"train": run.config.modules.pairs, "evaluation": run.config.modules.pairs // 10}


def _first_ids(run: Run) -> dict[str, int]:
    return {"train": 0, "evaluation": run.config.modules.pairs}


def _key(run: Run) -> Key[Array, ""]:
    return jax.random.key(run.seed("pairs"))


def _extract(run: Run, mesh: Mesh, check_signals: Callable[[], None]) -> None:
    """Draws both splits with the sampler that is best for the batch."""
    state, grid = trainer.restore(run, "arm", mesh)[1], facts.grid(run)
    params = networks.prepared(state["ema"], run.config.arm.model, grid)
    batch = sharding.whole_batch(run.config.sampling.batch_size, mesh)
    chosen = samplers.choose(run, batch, grid, has_modules=False)
    chunk = batch * samplers.batches_at_once(chosen)
    draw = samplers.compiled(
        run.config.arm.model, None, grid, chosen, chunk, batch, mesh=mesh if mesh.size > 1 else None
    )
    fields = {"x": np.dtype((np.uint8, (grid.height, grid.width, grid.channels))), "id": np.dtype(np.int32)}
    writers = extracted.begin(run, PAIRS, state, _sizes(run), fields, chunk)
    for split, size in _sizes(run).items():
        progress = trainer.progress(f"pairs for {split}", size)
        for start in range(writers[split].done, size, chunk):
            check_signals()
            samples = draw(params, _key(run), first_id=_first_ids(run)[split] + start)
            x = np.asarray(hosts.local(samples.x)).reshape(chunk, grid.height, grid.width, grid.channels)
            ids = _first_ids(run)[split] + start + np.arange(chunk, dtype=np.int32)
            progress(writers[split].add({"x": x.astype(np.uint8), "id": ids}))
    extracted.commit(run, PAIRS, state, writers, fields)


def _source(run: Run, split: str) -> Source:
    arrays, grid = extracted.open_arrays(run, PAIRS, split), facts.grid(run)

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        return {name: array[indices] for name, array in arrays.items()}

    shape = (grid.height, grid.width, grid.channels)
    origin = extracted.origin(run, PAIRS)
    return Source(f"pairs of {split}", len(arrays["x"]), shape, grid.values, 0, read, fingerprint=origin)


def _example(run: Run) -> dict[str, jax.ShapeDtypeStruct]:
    grid = facts.grid(run)
    x = jax.ShapeDtypeStruct((grid.height, grid.width, grid.channels), jnp.uint8)
    return {"x": x, "id": jax.ShapeDtypeStruct((), jnp.int32)}


def make(run: Run) -> Model:
    """L = sum_t KL_t / D, in nats per dimension. The ARM stands in `extra` and does not move.

    Raises InputError where the ARM has no categories to forecast.
    """
    config, arm_config, grid = run.config.modules.model, run.config.arm.model, facts.grid(run)
    if arm_config.output != "categorical":
        raise InputError("modules forecast categories; set arm.model.output='categorical', or leave out `modules`")
    modules.check(config, grid, "modules.model")
    dims = grid.height * grid.width * grid.channels

    def init(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        # The shapes of the ARM; `_trained_arm` puts its weights in their place.
        return modules.init(key, config, arm_config.filters, grid), {"arm": pixelcnn.init(key, arm_config, grid)}

    def divergence(params: PyTree, extra: PyTree, batch: Batch) -> Array:
        x = batch["x"].astype(jnp.int32)
        h = pixelcnn.hidden(extra["arm"], arm_config, grid, x)
        logits = pixelcnn.logits(extra["arm"], arm_config, grid, h)
        noise = None
        if "noise" in config.inputs:
            drawn = gumbel.noise(_key(run), grid.values)(batch["id"], jnp.arange(dims))
            noise = drawn.reshape(*x.shape, grid.values)
        inputs = modules.module_inputs(config, x, noise, grid.values)
        return modules.divergence(logits, modules.whole(params, grid, h, inputs))

    def loss(params: PyTree, extra: PyTree, batch: Batch, key: Array, step: Array) -> tuple[Array, Aux]:
        nats = divergence(params, extra, batch)
        return nats.mean() / dims, Aux({"forecast_kl_nats": nats}, (), ())

    def measure(params: PyTree, extra: PyTree, batch: Batch, key: Array) -> Aux:
        return Aux({"forecast_kl_nats": divergence(params, extra, batch)}, (), ())

    return Model(init, loss, measure, lambda means, tallies: means)


def _trained_arm(run: Run, mesh: Mesh) -> PyTree:
    """What a new state begins with."""
    return {"extra": {"arm": extracted.source_state(run, PAIRS, mesh)["ema"]["arm"]}}


def _pictures(run: Run, mesh: Mesh) -> Pictures:
    """Where the modules' forecasts were wrong, on samples of the same noise as those of the ARM's stage."""
    config, grid, levels = run.config, facts.grid(run), facts.of_run(run).levels
    count, key_of_samples = pictures.NUM_SAMPLES, jax.random.key(pictures.SEED)
    draw = samplers.compiled(config.arm.model, config.modules.model, grid, Sampler("modules"), count, count)
    decode = pictures.decoder(run, mesh)

    def draw_pictures(params: PyTree, extra: PyTree, key: Array) -> dict[str, np.ndarray]:
        prepared = networks.prepared({"arm": extra["arm"], "modules": params}, config.arm.model, grid)
        samples = draw(prepared, key_of_samples)
        return pictures.mistakes({"modules": samples}, grid, levels, decode)

    return draw_pictures
