"""Downloads a TFDS data set and prepares it as array_record files, the one step that needs TensorFlow.

python -m bitsperdim.prepare cifar10 --data_dir=FOLDER
"""

import argparse
import importlib.util
import sys


def main() -> int:
    """0, or 2 with a message where TensorFlow is missing."""
    parser = argparse.ArgumentParser(prog="python -m bitsperdim.prepare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="as in TFDS: 'cifar10', 'celeb_a_hq/64', 'cifar10:3.0.2'")
    parser.add_argument("--data_dir", help="default: $TFDS_DATA_DIR or ~/tensorflow_datasets")
    arguments = parser.parse_args()
    if importlib.util.find_spec("tensorflow") is None:
        print('error: preparing data needs TensorFlow: pip install "bitsperdim[prepare]"', file=sys.stderr)
        return 2
    import tensorflow_datasets as tfds

    builder = tfds.builder(arguments.name, data_dir=arguments.data_dir, file_format="array_record")
    builder.download_and_prepare()
    print(f"prepared {builder.data_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
