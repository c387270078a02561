"""See `bitsperdim.cli.sample`, or `python sample.py --help`."""

from bitsperdim import cli

if __name__ == "__main__":
    cli.sample()
