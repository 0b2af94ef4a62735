"""Reads what an offline run of wandb holds: records of protobuf in the framing of LevelDB's logs."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEADER, BLOCK = 7, 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class Offline:
    """One start of a run."""

    folder: Path
    run_id: str = ""
    project: str = ""
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None

    def series(self, name: str) -> list[tuple[int, Any]]:
        """(step, value) of a metric, with the rows of the history in their order."""
        return [(row["_step"], row[name]) for row in self.history if name in row]

    def table(self, step: int) -> dict[str, Any]:
        [value] = [value for at, value in self.series("completions") if at == step]
        return json.loads((self.folder / "files" / value["path"]).read_text(encoding="utf-8"))


def offline_run(place: Path) -> Offline:
    """The only one in a folder of wandb's."""
    [path] = place.glob("offline-run-*/*.wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    run = Offline(path.parent)
    for blob in _blobs(path.read_bytes()):
        record = Record.FromString(blob)
        if record.HasField("run"):
            run.run_id, run.project = record.run.run_id, record.run.project
            run.name = record.run.display_name
        if record.HasField("run") or record.HasField("config"):
            update = record.run.config if record.HasField("run") else record.config
            for item in update.update:
                run.config[item.key or item.nested_key[0]] = json.loads(item.value_json)
        if record.HasField("history"):
            run.history.append({})
            for item in record.history.item:
                *outer, last = item.nested_key or [item.key]
                row = run.history[-1]
                for key in outer:
                    row = row.setdefault(key, {})
                row[last] = json.loads(item.value_json)
        if record.HasField("artifact"):
            run.artifacts.append(record.artifact)
        if record.HasField("request") and record.request.HasField("log_artifact"):
            run.artifacts.append(record.request.log_artifact.artifact)
        if record.HasField("exit"):
            run.exit_code = record.exit.exit_code
    return run


def _blobs(data: bytes) -> Iterator[bytes]:
    place, parts = HEADER, b""
    while place + 7 <= len(data):
        left = BLOCK - place % BLOCK
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        part = data[place + 7 : place + 7 + length]
        place += 7 + length
        parts = part if kind in (FULL, FIRST) else parts + part
        if kind in (FULL, LAST):
            yield parts
