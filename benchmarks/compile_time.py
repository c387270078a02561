"""How long the training step of any stage of any config takes to trace, lower and compile, and how long its program is.

    python -m benchmarks compile_time --config=vdvae_cifar10:c1 --batch=4 --vary model.scan True False

From shapes alone: nothing is trained or allocated. Compiled for the devices at hand with all optimisations, without the
cache of programs that the scripts keep. `program_kb` is its text before XLA sees it.
"""

import argparse
import itertools
import time

from jax.sharding import Mesh

from benchmarks import untrained
from benchmarks.record import Record
from bitsperdim import plan, trained
from bitsperdim import step as step_lib
from bitsperdim.model import Stage
from bitsperdim.run import Run


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    untrained.add_flags(parser, "vdvae_cifar10:c1")
    arguments, record = parser.parse_args(), Record("compile_time")
    for of, run, stage, mesh in untrained.stages(arguments):
        record.say("step", of, **measure(run, stage, mesh))
    record.end()


def measure(run: Run, stage: Stage, mesh: Mesh) -> dict[str, float]:
    """Seconds of each part, of the clock; of all of them, of this process's processors."""
    assert stage.model and stage.settings and stage.optim
    begun = time.process_time()
    like = trained.abstract_state(run, stage, model := stage.model(run), mesh)
    batch = plan.abstract_batch(run, stage, mesh)
    step = step_lib.compiled(model, stage.optim, stage.settings, 0, mesh, like)
    times = [time.perf_counter()]
    traced = step.trace(like, *[batch] * stage.settings.steps_per_dispatch)  # pyright: ignore
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    lowered.compile()
    times.append(time.perf_counter())
    seconds = [later - earlier for earlier, later in itertools.pairwise(times)]
    return {
        "trace_seconds": seconds[0],
        "lower_seconds": seconds[1],
        "compile_seconds": seconds[2],
        "cpu_seconds": time.process_time() - begun,
        "program_kb": round(len(lowered.as_text()) / 1e3),
    }
