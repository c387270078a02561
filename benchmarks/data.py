"""Images a second of one source: read by index on the host, and as batches on the devices through `prefetch`.

python benchmarks/data.py --source=tfds --name=cifar10 --data_dir=FOLDER
"""

import argparse
import json
import time

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bitsperdim import data


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", default="synthetic", choices=data.SOURCES)
    parser.add_argument("--name", default="")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--image_size", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    config = data.DataConfig(
        arguments.source, name=arguments.name, data_dir=arguments.data_dir, image_size=arguments.image_size
    )
    source = data.open_source(config, "train")
    batch_size, steps = arguments.batch_size, arguments.steps
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    def read(step: int) -> dict[str, np.ndarray]:
        return source.read(data.train_indices(source.size, 0, step * batch_size, batch_size))

    def place(step: int) -> dict[str, jax.Array]:
        return data.train_batch(source, 0, step, batch_size, sharding)

    place(0)  # computes the order of the first epoch, which stays out of the timings
    for case, batches in (("read", map(read, range(steps))), ("prefetch", data.prefetch(place, 0, steps))):
        start = time.perf_counter()
        for batch in batches:
            jax.block_until_ready(batch)
        rate = steps * batch_size / (time.perf_counter() - start)
        print(json.dumps({"source": source.name, "case": case, "batch_size": batch_size, "images_per_second": rate}))


if __name__ == "__main__":
    main()
