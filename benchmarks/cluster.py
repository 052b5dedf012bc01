"""What a second Ray worker gains on a TIES merge, and what Ray costs on a short merge.

    python benchmarks/cluster.py --work /dev/shm/cluster     # needs pxmerge[cluster], and 4 GB there
    python benchmarks/cluster.py --layers 4 --rounds 1

Each command is a process of its own, in turn, with one thread for each worker: a merge without Ray, by one node on one
core, and by two such nodes on a core each, as if they were machines; the command itself is on the first. Seconds are
those that the command counts, from the first look at the output to the last rename: start and end of Python are left
out, joining the cluster and the workers' own start are not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from peers import make_checkpoints

NODE = {"num_cpus": 1, "include_dashboard": False}


def write_recipe(path: Path, method: str, work: Path, shard_size: str, sources: int) -> None:
    """Of as many sources, which are the three models in turn."""
    models = {f"source{number}": str(work / f"fine{number % 3}") for number in range(sources)}
    step: dict[str, object] = {"method": method, "sources": list(models)}
    models["base"] = str(work / "base")
    step |= {"base": "base"} if method == "ties" else {}
    path.write_text(json.dumps({"models": models, "merge": step, "output": {"shard_size": shard_size}}))


def seconds(recipe: Path, output: Path, words: Sequence[str]) -> float:
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "mergekit_px", "run", str(recipe), "-o", str(output), "--json", "--threads", "1"]
    run = subprocess.run([*command, *words], stdout=subprocess.PIPE, check=True)
    return float(json.loads(run.stdout)["seconds"])


def measured(recipe: Path, output: Path, rounds: int) -> list[list[float]]:
    """By round: without Ray, by one worker, by two."""
    from ray.cluster_utils import Cluster

    rows = []
    cores = os.sched_getaffinity(0)
    first, second, *_ = sorted(cores)
    seconds(recipe, output, [])  # so that no run hashes the inputs first
    for _ in range(rounds):
        os.sched_setaffinity(0, {first})  # which processes inherit
        row = [seconds(recipe, output, [])]
        cluster = Cluster(initialize_head=True, head_node_args=NODE)
        try:
            row.append(seconds(recipe, output, ["--cluster", f"ray:{cluster.address}"]))
            os.sched_setaffinity(0, {second})
            cluster.add_node(num_cpus=1)
            os.sched_setaffinity(0, {first})
            row.append(seconds(recipe, output, ["--cluster", f"ray:{cluster.address}"]))
        finally:
            cluster.shutdown()
            os.sched_setaffinity(0, cores)
        rows.append(row)
        print("  ".join(f"{value:.1f}" for value in row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sources", type=int, default=9, help="of the TIES merge")
    parser.add_argument("--shard-size", default="60MB")
    parser.add_argument("--work", type=Path, help="where the models are made, and left")
    options = parser.parse_args()
    os.environ.update({"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"})
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        if not (work / "fine2" / "config.json").exists():
            make_checkpoints(work, options.layers)
        for method, sources in (("ties", options.sources), ("linear", 3)):
            recipe = work / f"{method}.json"
            write_recipe(recipe, method, work, options.shard_size, sources)
            print(f"{method} of {sources}, seconds without Ray, with one worker, with two:")
            rows = measured(recipe, work / "merged", options.rounds)
            gain = statistics.median(one / two for _, one, two in rows)
            cost = statistics.median(one - alone for alone, one, _ in rows)
            print(f"{method}: two workers are {gain:.2f} times as fast as one; one costs {cost:.1f} s more than no Ray")


if __name__ == "__main__":
    main()
