"""See `bitsperdim.cli.sample`, or `python sample.py --help`."""

from bitsperdim import scripts

if __name__ == "__main__":
    scripts.sample()
