"""What devices send each other in a training step of every family: one table, held against compiled programs.

python tests/toy/step_collectives.py 64        on so many devices of the CPU, in a process of its own
"""

import math
import sys

import jax
import jax.numpy as jnp

from bitsperdim import config_files, plan, program, trained
from bitsperdim import step as step_lib

# Every step sums gradients over its devices, and the few means that it reports; where weights are sharded they are
# gathered, as often as the passes that use them in a loop, and a device may keep its part of a sum. Beside that:
SUMS = {
    # (config, stage): sums over the global batch that the family needs
    ("vqvae2_photos", "autoencoder"): "hits, vector sums and candidates of the codebooks",
    ("vqvae2_photos", "top"): "",
    ("vqvae2_photos", "bottom"): "",
    ("vqvae2_photos with BatchNorm", "bottom"): "moments of BatchNorm",
    ("vdvae_digits", "model"): "divergences of the layers, for gamma",
    ("flows_digits", "model"): "",
    ("arm_digits", "arm"): "",
    ("arm_latent_cifar10", "autoencoder"): "hits, vector sums and candidates of the codebooks",
    ("arm_latent_cifar10", "arm"): "",
}
KINDS = {"replicated": {"all-reduce"}, "fsdp": {"all-reduce", "reduce-scatter", "all-gather"}}
# Where layers split sharded kernels by their outputs, the pieces move to where the compiler wants them.
PIECES = {("vdvae_digits", "model"): {"collective-permute", "all-to-all"}}
EACH = 32  # examples on each device: activations of so many would break the bounds
NUMBERS = 64  # of means, norms and the like
PASSES = 3  # forward, computed again, backward


def check(case: tuple[str, str], count: int, fsdp: int) -> str:
    """Asserts that a step of a case on so many devices sends what the table says, and nothing else."""
    name, stage_name = case
    values = config_files.load(f"{name.split()[0]}:tiny")
    if name.endswith("BatchNorm"):
        values.bottom.model.conditioning.norm = "batch"
    if "arm" in values:
        values.arm.model.filters = values.arm.forecast.filters = 16  # which eight devices divide
    values.mesh = {"data": -1, "fsdp": fsdp, "smallest": 0}
    (values if "train" in values else values[stage_name]).train.batch_size = EACH * count
    with plan.planned(values, count) as (run, mesh):
        stage = run.stage(stage_name)
        model, batch = stage.model(run), plan.abstract_batch(run, stage, mesh)
        like = trained.abstract_state(run, stage, model, mesh)
        step = step_lib.compiled(model, stage.optim, stage.settings, 0, mesh, like).lower(like, batch)
        found = program.collectives(step.compile({"xla_backend_optimization_level": "0"}).as_text())
        _, aux = jax.eval_shape(
            model.loss, like["params"], like["extra"], batch, jax.random.key(0), jax.ShapeDtypeStruct((), jnp.int32)
        )
    params = jax.tree.leaves(like["params"])
    sharded = [leaf for leaf in params if not leaf.sharding.is_fully_replicated]
    kinds = KINDS["fsdp" if sharded else "replicated"]
    pieces = PIECES.get(case, set()) if sharded else set()
    strange = [one for one in found if one.kind not in kinds | pieces]
    assert not strange, strange

    numbers = lambda leaves: sum(math.prod(leaf.shape) for leaf in leaves)
    statistics = jax.tree.leaves((aux.tallies, aux.statistics)) if SUMS[case] else []
    moved = lambda kind: sum(one.bytes * one.times for one in found if one.kind == kind) / 4
    summed = moved("all-reduce") + moved("reduce-scatter")
    # Gradients that no example takes part in, as those of a log-determinant alone, need no sum. With several groups of
    # devices that hold all weights together there is one in the groups, and one between them. Where there is one group
    # the sums of a codebook, a tenth of such small weights, must not pass for rounding.
    least, most = 0.9 * numbers(params), numbers(params) * (2.3 if 1 < fsdp < count else 1.02)
    assert least <= summed <= most + numbers(statistics) + NUMBERS, (least, summed, most, numbers(statistics))
    assert sum(map(moved, pieces)) <= numbers(sharded) / 10
    gathered = [shape for one in found if one.kind == "all-gather" for shape in one.shapes]
    # Of stacked layers those of one are gathered at a time.
    shapes = {_without_ones(leaf.shape[i:]) for leaf in sharded for i in range(leaf.ndim)}
    assert pieces or set(map(_without_ones, gathered)) <= shapes, set(gathered)
    assert moved("all-gather") <= PASSES * numbers(params), (moved("all-gather"), numbers(params))
    sent = {kind: round(4 * moved(kind)) for kind in sorted(kinds | pieces) if moved(kind)}
    return f"{name}, {stage_name}, on {count} devices, fsdp {fsdp}: bytes {sent}"


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size > 1)


if __name__ == "__main__":
    count = int(sys.argv[1])
    plan.use_devices(count)
    for case in SUMS:
        for fsdp in (1, 8):
            print(check(case, count, fsdp), flush=True)
