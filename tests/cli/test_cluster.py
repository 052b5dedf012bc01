"""A merge by the workers of a Ray cluster: three nodes on this machine, one of which is killed; into a store too, and
trials of a search, one of which loses its worker."""

from __future__ import annotations

import _thread
import json
import os
import pickle
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from folders import contents
from safetensors.torch import load_file, save_file
from store_server import FakeStore, point_at

from mergekit_px.errors import NonFiniteError, PlanError
from mergekit_px.execute.array import publish_parts
from mergekit_px.execute.cluster import MergeAssignment, sweep_share, swept, write_part
from mergekit_px.execute.ray_tasks import SharedFolders, on_worker, raise_own
from mergekit_px.learn.inputs import open_inputs
from mergekit_px.learn.search.cluster import SearchAssignment
from mergekit_px.learn.search.settings import SearchSettings
from mergekit_px.plan.build import build_plan
from mergekit_px.plan.method_catalog import method_catalog
from mergekit_px.plan.model import Plan
from mergekit_px.plan.options import PlanOptions
from mergekit_px.recipe.load import load_recipe

RECIPE = """
models: {base: base, math: math, code: code}
merge: {method: linear, sources: [math, code]}
output: {shard_size: 700}
"""
SEARCHED = """
models: {base: base, a: math, b: code}
merge: {method: linear, sources: {a: 0.5, b: 0.5}}
"""
SCORE = """
import os, pathlib, signal, sys, time
weights = b"".join(path.read_bytes() for path in pathlib.Path(sys.argv[1]).glob("*.safetensors"))
doomed = pathlib.Path("doomed")  # the worker of the second trial
if doomed.exists() and not doomed.read_text():
    doomed.write_text("by the next")
elif doomed.exists():
    doomed.unlink()
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
print(sum(weights) % 1009)
"""


@pytest.fixture(autouse=True)
def recipe(models) -> None:
    Path("recipe.yaml").write_text(RECIPE)


def soon(act: Callable[[], bool]) -> threading.Thread:
    """Try something in a thread until it is done."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not act():
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def interrupt_after_two_parts() -> bool:
    there = len(list(Path("merged/.pxmerge/array").glob("*/pxmerge.lock.json"))) >= 2
    if there:
        _thread.interrupt_main()
    return there


def kill_at_work(cluster, node) -> bool:
    """Kill a node, once one of its workers has a part in hand, which it is kept from finishing."""
    for lock in Path("merged/.pxmerge/array").glob("*/.pxmerge/lock"):
        try:
            worker = int(lock.read_text())
            parent = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == node.all_processes["raylet"][0].process.pid:
            os.kill(worker, signal.SIGSTOP)
            cluster.remove_node(node, allow_graceful=False)
            os.kill(worker, signal.SIGKILL)
            return True
    return False


def guided(cluster: str, address: str = "", page: str = "parts.md") -> list[str]:
    """The command of a guide for a kind of cluster, whose address there is replaced by another."""
    guide = (Path(__file__).parents[2] / "docs" / page).read_text().replace("10.0.0.1:6379", address)
    lines = [line for line in guide.splitlines() if line.endswith(f"--cluster {cluster}{address}")]
    assert len(lines) == 1
    return shlex.split(lines[0])[1:]


def test_a_merge_goes_on_from_here_to_three_nodes_and_survives_one(run, monkeypatch) -> None:
    pytest.importorskip("ray")
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc")
    from ray.cluster_utils import Cluster

    for name in ("base", "math", "code"):
        weights = load_file(f"{name}/model.safetensors")
        layers = {f"model.layers.{n}.mlp.down_proj.weight": weights["lm_head.weight"] * n for n in range(60)}
        save_file(weights | layers, f"{name}/model.safetensors", {"format": "pt"})
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    assert run("run", "recipe.yaml", "-o", "merged").code == 0
    Path("merged").rename("whole")

    watcher = soon(interrupt_after_two_parts)
    outcome = run(*guided("ray"), "--threads", 1)
    watcher.join()
    assert outcome.code == 130 and "--resume" in outcome.stderr
    assert not Path("merged/pxmerge.lock.json").exists()

    own = {"num_cpus": 1, "include_dashboard": False, "node_ip_address": "127.0.0.2"}
    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}
    server = FakeStore()
    with server:
        point_at(server, monkeypatch)  # before there are workers, which find the store by what they inherit
        server.create("models")
        cluster = Cluster(initialize_head=True, head_node_args=own | {"_system_config": health})
        try:
            node, _ = (cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{number}") for number in (2, 3))
            watcher = soon(lambda: kill_at_work(cluster, node))
            outcome = run(*guided("ray:", cluster.address), "--threads", 1, "--resume")
            watcher.join()
            assert outcome.code == 0, outcome.stderr
            assert outcome.stdout == "merged\n"
            assert "begun again" in outcome.stderr
            assert contents("merged") == contents("whole")
            words = ("run", "recipe.yaml", "--set", "output.shard_size=60000", "--cluster", f"ray:{cluster.address}")
            assert run("run", "recipe.yaml", "--set", "output.shard_size=60000", "-o", "here/merged").code == 0
            outcome = run(*words, "-o", "s3://models/merged")
            assert outcome.code == 0, outcome.stderr
            assert server.objects("models") == {
                f"merged/{name}": data for name, data in contents("here/merged").items()
            }
            Path("score.py").write_text(SCORE)
            Path("score.sh").write_text(f"#!/bin/sh\nexec {sys.executable} -S score.py $1")
            Path("score.sh").chmod(0o755)
            Path("recipe.yaml").write_text(SEARCHED)
            words = guided("ray:", cluster.address, "learn-search.md")
            alone = run(*words[:-2], "--json", "-o", "alone")
            assert alone.code == 0, alone.stderr
            Path("doomed").touch()
            outcome = run(*words, "--json", "--threads", 1)
            assert outcome.code == 0, outcome.stderr
            assert "of the workers were lost, and their trials were begun again" in outcome.stderr
            one, other = (json.loads(found.stdout) for found in (alone, outcome))
            assert {**one, "output": 0} == {**other, "output": 0} and one["trials"] == 3
            assert contents("found/model") == contents("alone/model") and not Path("found/.pxmerge").exists()
        finally:
            cluster.shutdown()


class InThisProcess:
    """Tasks of a cluster with two places, done here one after the other, the last first."""

    places = 2

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sweeps = 0

    def run(self, work, arguments, shared, tell):
        self.sweeps += work is sweep_share
        order = sorted(arguments, reverse=True)
        shared = pickle.dumps(shared)
        return {
            number: pickle.loads(
                pickle.dumps(work(self.plan, number, arguments[number], pickle.loads(shared), lambda state: None))
            )
            for number in order
        }


@pytest.mark.parametrize(
    "step",
    [
        "{method: ties, base: base, params: {density: 0.5}}",
        "{method: metagpt, base: base}",
        "{method: geometric_median, base: base}",
    ],
)
def test_statistics_are_swept_in_shares(run, step: str) -> None:
    recipe = f"models: {{base: base, math: math, code: code}}\nmerge: {step}\noutput: {{shard_size: 700}}"
    Path("recipe.yaml").write_text(recipe.replace("}\noutput", ", sources: [math, code]}\noutput"))
    assert run("run", "recipe.yaml", "-o", "out").code == 0
    Path("out").rename("whole")
    plan = build_plan(load_recipe("recipe.yaml", methods=method_catalog()), PlanOptions(output=Path("out")))
    tasks = InThisProcess(plan)
    totals = swept(plan, tasks)
    assert tasks.sweeps == sum(map(len, totals)) > 0
    count = len(plan.layout.shards)
    tasks.run(write_part, dict.fromkeys(range(1, count + 1), 0), totals, None)
    publish_parts(Path("out"))
    assert contents("out") == contents("whole")


def test_a_result_that_is_there_is_left_alone_and_begins_nothing(run) -> None:
    assert run("run", "recipe.yaml", "-o", "out").code == 0
    outcome = run("run", "recipe.yaml", "-o", "out", "--cluster", "ray:127.0.0.1:9")
    assert outcome.code == 0 and "up to date" in outcome.stderr


def test_an_error_of_a_worker_reads_as_one_here() -> None:
    pytest.importorskip("ray")
    from ray.exceptions import RayTaskError, WorkerCrashedError

    error = NonFiniteError("a NaN", where="math: norm", hint="pass --allow-nonfinite")
    carried = pickle.loads(pickle.dumps(RayTaskError("on_worker", "", error)))
    with pytest.raises(NonFiniteError) as raised:
        raise_own(carried.as_instanceof_cause())
    assert str(raised.value) == str(error) and raised.value.exit_code == 5
    raise_own(WorkerCrashedError())  # is nothing that the task raised


@pytest.mark.parametrize(
    ("cluster", "code", "message"),
    [
        ("slurm", 2, "write ray, ray:HOST:PORT"),
        ("ray:", 2, "'ray:' is no cluster"),
        ("ray:head", 2, "'ray:head' is no cluster"),
        ("ray:head:99999", 2, "is no cluster"),
        ("ray:127.0.0.2:9", 3, "127.0.0.2:9: no Ray cluster answers there"),
    ],
)
def test_what_is_no_cluster(run, cluster: str, code: int, message: str) -> None:
    outcome = run("run", "recipe.yaml", "-o", "out", "--cluster", cluster)
    assert outcome.code == code and message in outcome.stderr.splitlines()[-1]
    assert not Path("out").exists()


def test_a_server_of_another_kind(run) -> None:
    with socket.create_server(("127.0.0.2", 0)) as server:
        server.settimeout(30)

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        outcome = run("run", "recipe.yaml", "-o", "out", "--cluster", f"ray:127.0.0.2:{server.getsockname()[1]}")
        thread.join()
    assert outcome.code == 3 and "no Ray cluster answers there" in outcome.stderr


def test_ray_is_named_where_it_is_missing(run, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    outcome = run("run", "recipe.yaml", "-o", "out", "--cluster", "ray")
    assert outcome.code == 2 and "pip install 'pxmerge[cluster]'" in outcome.stderr
    outcome = run("run", "recipe.yaml", "-o", "out", "--cluster", "ray", "--part", "1/2")
    assert outcome.code == 2 and "give one of them" in outcome.stderr


def test_parts_of_a_job_array_are_not_mixed_in(run) -> None:
    assert run("run", "recipe.yaml", "-o", "out", "--part", "1/2").code == 0
    outcome = run("run", "recipe.yaml", "-o", "out", "--cluster", "ray")
    assert outcome.code == 4 and "parts of 2 are there" in outcome.stderr


def test_what_a_worker_must_see(tmp_path: Path, models) -> None:
    plan = build_plan(load_recipe("recipe.yaml", methods=method_catalog()), PlanOptions(output=Path("out")))
    witness = tmp_path / "out" / ".pxmerge" / "cluster"
    witness.parent.mkdir(parents=True)
    witness.write_bytes(b"1\n")
    folders = SharedFolders(str(tmp_path), "out", (str(witness), b"1\n"))
    good = MergeAssignment(plan.loaded, plan.options, folders, plan.hash)
    assert pickle.loads(pickle.dumps(good)).begin().hash == plan.hash
    for change, message in (
        ({"folders": replace(folders, current="/no/such")}, "does not see the folder /no/such"),
        ({"folders": replace(folders, witness=(str(witness), b"2\n"))}, "does not see the output folder out"),
        ({"plan_hash": "0"}, "sees other inputs than this machine"),
    ):
        with pytest.raises(PlanError, match=message):
            replace(good, **change).begin()
    settings = SearchSettings(recipe="recipe.yaml", over=["merge.sources.math=0,1"], score="./score.sh {}")
    search = SearchAssignment(settings, folders, open_inputs(settings).prints(), "cpu", 1, tmp_path)
    for change, message in (
        ({}, r"cannot score: ./score.sh: no such program"),
        ({"prints": {}}, "sees other inputs than this machine"),
        ({"settings": settings.model_copy(update={"scratch": "/no/such"})}, "has no folder /no/such"),
    ):
        with pytest.raises(PlanError, match=message):
            replace(search, **change).begin()
    Path("code").rename("elsewhere")
    for assignment in (good, search):
        with pytest.raises(PlanError, match=r"cannot read an input: .*code"):
            assignment.begin()
    with pytest.raises(PlanError, match=r"has pxmerge .* and this machine has 0.0"):
        next(on_worker("0.0", b"", b"", 1, 0, []))
