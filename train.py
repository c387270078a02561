"""See `bitsperdim.cli.train`, or `python train.py --help`."""

from bitsperdim import scripts

if __name__ == "__main__":
    scripts.train()
