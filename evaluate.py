"""See `bitsperdim.cli.evaluate`, or `python evaluate.py --help`."""

from bitsperdim import scripts

if __name__ == "__main__":
    scripts.evaluate()
