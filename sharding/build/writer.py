"""One shard as a USTAR file whose bytes depend on its members alone, and the index written after it."""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO, Unpack

from cliplift.sharding.manifest import MEMBERS, Refused, Sample, SampleRow, ShardIndex, dump_index, index_file
from cliplift.sharding.scratch import scratch_folder
from cliplift.sharding.storage import Store, hold, remove_temporaries_of, temporary_beside

BLOCK = tarfile.BLOCKSIZE


class ShardWriter:
    """Writes one shard: members in order, then :meth:`commit` publishes the tar and, last, its index.

    Nothing is visible under the final names before ``commit``; :meth:`abandon` leaves no trace.
    """

    def __init__(self, store: Store, tar: str, *, shard: int, split: str, plan_id: str) -> None:
        self.store, self.tar = store, tar
        self.shard, self.split, self.plan_id = shard, split, plan_id
        self.samples: list[Sample] = []
        self.refused: list[Refused] = []
        self.picture_hashes: list[tuple[int, ...]] = []
        self._hash = hashlib.sha256()
        self._offset = 0
        self._held = ExitStack()
        local = store.local_path(tar)
        if local is not None:
            local.parent.mkdir(parents=True, exist_ok=True)
            for target in (local, local.with_name(Path(index_file(tar)).name)):
                # Those of a killed build of this very shard, never a living one's.
                remove_temporaries_of(target)
            self._path = temporary_beside(local)
        else:
            self._path = self._held.enter_context(scratch_folder()) / "shard.tar"
        self._file: BinaryIO = self._path.open("wb")
        hold(self._file)

    def add(
        self,
        *,
        mp4: bytes,
        flow: bytes = b"",
        facts: Mapping[str, object],
        picture_hashes: tuple[int, ...],
        **row: Unpack[SampleRow],
    ) -> None:
        """Append ``KEY.mp4``, ``KEY.json`` and, if there is flow, ``KEY.flow.mp4``."""
        payload = json.dumps(facts, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=None).encode()
        self.add_members(mp4=mp4, payload=payload, flow=flow, picture_hashes=picture_hashes, **row)

    def add_members(
        self,
        *,
        mp4: bytes,
        payload: bytes,
        flow: bytes = b"",
        picture_hashes: tuple[int, ...],
        **row: Unpack[SampleRow],
    ) -> None:
        """The same with the JSON member as bytes."""
        key = row["key"]
        self.picture_hashes.append(picture_hashes)
        mp4_offset, json_offset = self._member(f"{key}.mp4", mp4), self._member(f"{key}.json", payload)
        self.samples.append(
            Sample(
                mp4_offset=mp4_offset,
                mp4_bytes=len(mp4),
                mp4_crc32=zlib.crc32(mp4),
                json_offset=json_offset,
                json_bytes=len(payload),
                json_crc32=zlib.crc32(payload),
                flow_offset=self._member(f"{key}.{MEMBERS['flow']}", flow) if flow else 0,
                flow_bytes=len(flow),
                flow_crc32=zlib.crc32(flow),
                **row,
            )
        )

    def refuse(self, refused: Refused) -> None:
        """Record a clip that is not written."""
        self.refused.append(refused)

    def commit(self) -> ShardIndex:
        """Seal the tar, publish it, then publish its index."""
        self._write(bytes(2 * BLOCK))
        self._write(bytes(-self._offset % tarfile.RECORDSIZE))
        self._file.flush()
        index = ShardIndex(
            shard=self.shard,
            split=self.split,
            tar=self.tar,
            tar_bytes=self._offset,
            tar_sha256=self._hash.hexdigest(),
            plan_id=self.plan_id,
            samples=tuple(self.samples),
            refused=tuple(self.refused),
            picture_hashes=tuple(self.picture_hashes),
        )
        with self._held:
            self.store.publish(self._path, self.tar)
            self._file.close()  # only now: until it has its final name, nobody else may take it for left over
            self.store.write(index_file(self.tar), dump_index(index))
        return index

    def abandon(self) -> None:
        """Throw the unfinished tar away, also where closing it fails because the disk is full."""
        self._path.unlink(missing_ok=True)
        with self._held, suppress(OSError):
            self._file.close()

    def _member(self, name: str, data: bytes) -> int:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o644
        self._write(info.tobuf(format=tarfile.USTAR_FORMAT))
        offset = self._offset
        self._write(data)
        self._write(bytes(-len(data) % BLOCK))
        return offset

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._offset += len(data)
