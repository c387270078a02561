"""Measurements of speed and memory, tables of sizes, figures of trained runs; `python -m benchmarks` lists them.

Not installed, and part of no test but that they start: they take a checkout of the repository.
"""
