"""What the scripts ask of the system before anything else."""

import os
import platform
import subprocess
import sys

import pytest

# Pages that the system hands out for ten texts of 64 MiB, one after the other, when there has been one.
COUNT = """
import resource
from bitsperdim import scripts
scripts.keep_freed_memory()
b"x" * 2**26
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    b"x" * 2**26
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages(**environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run(
        [sys.executable, "-c", COUNT], env=kept | environment, capture_output=True, text=True, check=True
    )
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of glibc")
def test_freed_memory_is_kept_unless_the_user_says_otherwise():
    assert pages() < 100
    assert pages(MALLOC_MMAP_THRESHOLD_="1000000") > 100_000
