"""See `bitsperdim.cli.convert`, or `python convert.py --help`."""

from bitsperdim import scripts

if __name__ == "__main__":
    scripts.convert()
