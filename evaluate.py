"""See `bitsperdim.cli.evaluate`, or `python evaluate.py --help`."""

from bitsperdim import cli

if __name__ == "__main__":
    cli.evaluate()
