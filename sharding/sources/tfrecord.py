"""TFRecord files and the two protocol-buffer messages inside, read without TensorFlow.

Framing (TensorFlow, ``core/lib/io/record_writer.h``): length (uint64), masked crc32c of the length, data, masked
crc32c of the data. Messages (``core/example/example.proto``): ``Example.features`` and ``SequenceExample.context``
are both field 1 and both a map from name to bytes, floats or integers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

POLYNOMIAL = 0x82F63B78  # Castagnoli, reflected
MASK_DELTA = 0xA282EAD8


class RecordError(ValueError):
    """A record is damaged; the message names file and record."""


def _table() -> tuple[int, ...]:
    rows = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (POLYNOMIAL if value & 1 else 0)
        rows.append(value)
    return tuple(rows)


_CRC_TABLE = _table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of the data."""
    table, value = _CRC_TABLE, 0xFFFFFFFF
    for byte in data:
        value = table[(value ^ byte) & 0xFF] ^ value >> 8
    return value ^ 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """The rotated and shifted checksum that TFRecord stores."""
    value = crc32c(data)
    return ((value >> 15 | value << 17) + MASK_DELTA) & 0xFFFFFFFF


def records(data: bytes, *, file: str) -> Iterator[bytes]:
    """The payloads of a TFRecord file, each checked.

    Raises:
        RecordError: the file is cut short or a checksum differs.
    """
    at = number = 0
    while at < len(data):
        if at + 12 > len(data):
            raise RecordError(f"{file}, record {number}: the file ends inside a header")
        length, length_crc = struct.unpack_from("<QI", data, at)
        if masked_crc32c(data[at : at + 8]) != length_crc:
            raise RecordError(f"{file}, record {number}: the checksum of its length differs")
        if at + 16 + length > len(data):
            raise RecordError(f"{file}, record {number}: the file ends inside it")
        payload = data[at + 12 : at + 12 + length]
        (payload_crc,) = struct.unpack_from("<I", data, at + 12 + length)
        if masked_crc32c(payload) != payload_crc:
            raise RecordError(f"{file}, record {number}: its checksum differs")
        yield payload
        at += 16 + length
        number += 1


def context_features(message: bytes) -> dict[str, list[bytes] | list[int]]:
    """The bytes and integer features of an ``Example``, or of the context of a ``SequenceExample``.

    Raises:
        RecordError: the message is not well formed.
    """
    found: dict[str, list[bytes] | list[int]] = {}
    for number, features in _fields(message):
        if number != 1 or not isinstance(features, bytes):
            continue
        for entry_number, entry in _fields(features):
            if entry_number == 1 and isinstance(entry, bytes):
                name, values = _map_entry(entry)
                if values is not None:
                    found[name] = values
    return found


def _map_entry(entry: bytes) -> tuple[str, list[bytes] | list[int] | None]:
    name, values = "", None
    for number, value in _fields(entry):
        if number == 1 and isinstance(value, bytes):
            name = value.decode()
        elif number == 2 and isinstance(value, bytes):
            values = _feature(value)
    return name, values


def _feature(message: bytes) -> list[bytes] | list[int] | None:
    for kind, content in _fields(message):
        assert isinstance(content, bytes)
        if kind == 1:  # bytes_list
            return [v for n, v in _fields(content) if n == 1 and isinstance(v, bytes)]
        if kind == 3:  # int64_list, packed or not
            integers: list[int] = []
            for _, value in _fields(content):
                integers += _packed(value) if isinstance(value, bytes) else [value]
            return integers
    return None


def _packed(data: bytes) -> list[int]:
    integers, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        integers.append(value)
    return integers


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Field numbers and values of a message: varints as int, everything else as bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if wire == 2:
            length, at = _varint(message, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise RecordError(f"wire type {wire} is not of this message")
        if at + length > len(message):
            raise RecordError("a field runs over the end of its message")
        yield key >> 3, message[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise RecordError("a number runs over the end of its message")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
