"""A small output with every awkward tensor, for the writer's tests; also run as a child that gets killed.

    python output_sample.py FOLDER MODE KILL_AFTER_WRITES [STOP]

STOP ``publish`` kills the child inside publishing, after KILL_AFTER_WRITES renames.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import zlib
from pathlib import Path

from mergekit_px.checkpoint.dtypes import DTYPES
from mergekit_px.checkpoint.layout import OutputLayout, OutputTensor, plan_layout
from mergekit_px.checkpoint.writer import CheckpointWriter

PIECE = 1000
PLAN = "plan-1"
SIDE_FILES: dict[str, bytes | Path] = {"config.json": b'{"a": 1}', "tokenizer.json": b"{}"}


def sample_layout(shard_size: int = 8_000, scale: int = 1) -> OutputLayout:
    tensors = [OutputTensor(f"layer.{n}.weight", DTYPES["BF16"], (50 * scale, 10 + n)) for n in range(8)]
    tensors += [
        OutputTensor("big", DTYPES["F32"], (200 * scale, 60)),
        OutputTensor("packed", DTYPES["F4"], (7, 6)),
        OutputTensor("scales", DTYPES["F8_E4M3"], (33,)),
        OutputTensor("empty", DTYPES["F32"], (0, 4)),
        OutputTensor("scalar", DTYPES["I64"], ()),
    ]
    return plan_layout(tensors, shard_size=shard_size, metadata={"format": "pt"})


def content(name: str, nbytes: int) -> bytes:
    return random.Random(zlib.crc32(name.encode())).randbytes(nbytes)


def pieces(layout: OutputLayout, piece: int = PIECE, seed: int = 0) -> list[tuple[str, int, bytes]]:
    """All writes that make the output, cut into ``piece`` bytes, in a random order."""
    found = []
    for name, (_, _, nbytes) in layout.location.items():
        whole = content(name, nbytes)
        found += [(name, start, whole[start : start + piece]) for start in range(0, nbytes, piece)]
    random.Random(seed).shuffle(found)
    return found


def expected_files(layout: OutputLayout) -> dict[str, bytes]:
    files = {}
    for shard in layout.shards:
        data = (content(entry.name, entry.end - entry.begin) for entry in shard.header.entries.values())
        files[shard.file] = shard.header_bytes + b"".join(data)
    return files | layout.indices


def files_in(folder: Path) -> dict[str, bytes]:
    """All files but the lock file, which lists them."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "pxmerge.lock.json"
    }


def main(folder: str, mode: str, kill_after: str, stop: str = "write") -> None:
    layout = sample_layout()
    writer = CheckpointWriter(Path(folder), layout, PLAN, mode=mode)  # type: ignore[arg-type]
    todo = [
        each
        for each in pieces(layout, seed=int(kill_after))
        if not writer.done(each[0], each[1], each[1] + len(each[2]))
    ]
    print(len(todo), flush=True)
    for number, (name, start, data) in enumerate(todo):
        if stop == "write" and number == int(kill_after):
            os.kill(os.getpid(), signal.SIGKILL)
        writer.write(name, start, memoryview(data))
    if stop == "publish":
        count = 0
        rename = Path.replace

        def killing(self: Path, target: Path) -> Path:
            nonlocal count
            if count == int(kill_after):
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return rename(self, target)

        Path.replace = killing  # type: ignore[method-assign, assignment]
    writer.publish(SIDE_FILES)


if __name__ == "__main__":
    main(*sys.argv[1:])
