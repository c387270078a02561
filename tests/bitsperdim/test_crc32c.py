"""CRC-32C against the vectors of RFC 3720, and against division bit by bit."""

import numpy as np
import pytest

from bitsperdim import crc32c


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
    ],
)
def test_known_vectors(content, expected):
    assert crc32c.crc32c(content) == expected


@pytest.mark.parametrize("size", [1, 16, 17, 1019, 1020, 1021, 2044, 65532, 65533, 70001])
def test_every_length_gives_what_long_division_gives(size):
    content = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    assert crc32c.crc32c(content) == crc ^ 0xFFFFFFFF
