"""See `bitsperdim.cli.train`, or `python train.py --help`."""

from bitsperdim import cli

if __name__ == "__main__":
    cli.train()
