"""YouTube-8M's records, written by hand: a framed tf.train.Example with the labels of a video."""

from __future__ import annotations

import struct

from cliplift.sharding.sources.tfrecord import masked_crc32c


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def example(video_id: str, labels: list[int], *, name: str = "id", extra: bytes = b"") -> bytes:
    """A tf.train.Example (or a SequenceExample: the context is the same field), written by hand."""
    features = {
        name: field(1, field(1, video_id.encode())),
        "labels": field(3, field(1, b"".join(map(varint, labels)))),
        "mean_rgb": field(2, field(1, struct.pack("<4f", 1, 2, 3, 4))),
    }
    entries = b"".join(field(1, field(1, key.encode()) + field(2, value)) for key, value in features.items())
    return field(1, entries) + extra


def record(payload: bytes) -> bytes:
    length = struct.pack("<Q", len(payload))
    return (
        length
        + struct.pack("<I", masked_crc32c(length))
        + payload
        + struct.pack("<I", masked_crc32c(payload))
    )
