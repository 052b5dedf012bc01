"""A mapping that is killed at any point, and the same command again."""

from __future__ import annotations

import json
import subprocess
import sys

from mergekit_px.cli import main

SCRIPT = """
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import mergekit_px.learn.acmap.mapping
from mergekit_px.checkpoint import replacement
from mergekit_px.cli import main

start, folder, words = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]


def killed_at(point):
    count = 0

    def step():
        nonlocal count
        count += 1
        if count == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def with_steps(function):
        def call(*given, **named):
            step()
            return function(*given, **named)

        return call

    Path.replace, Path.unlink = with_steps(Path.replace), with_steps(Path.unlink)
    replacement.sync = with_steps(replacement.sync)
    os._exit(main(words))


def waited(action, *given):
    child = os.fork()
    if not child:
        action(*given)
    return os.waitpid(child, 0)[1]


def results():
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def begin_anew():
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(start, folder)


begin_anew()
assert main(words) == 0
expected, points, differ = results(), 0, []
for point in range(1, 100):
    begin_anew()
    status = waited(killed_at, point)
    if os.WIFEXITED(status):
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    status = waited(lambda: os._exit(main([*words, "--resume"])))
    assert status == 0, (point, status)
    found, points = results(), point
    differ += [(point, name) for name in found | expected if found.get(name) != expected.get(name)]
print(json.dumps({"points": points, "files": sorted(expected), "differ": differ}))
"""


def test_killed_anywhere_and_run_again(problem) -> None:
    model = ["--base", str(problem.folder / "base"), "--model", problem.model, "--allow-code", "--device", "cpu"]
    for task in (1, 2):
        data = problem.write_data(task)
        assert main(["acmap", "map", "--state", str(problem.state), "--data", data, *model, "-q"]) == 0
    start = problem.folder / "start"
    start.mkdir()
    problem.state.rename(start / "state")
    script, folder = problem.folder / "script.py", problem.folder / "work"
    script.write_text(SCRIPT)
    words = ["acmap", "map", "--state", str(folder / "state"), "--data", problem.write_data(3), *model, "-q"]
    words += ["-o", str(folder / "prototypes.safetensors")]
    finished = subprocess.run(
        [sys.executable, str(script), str(start), str(folder), *words], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    outcome = json.loads(finished.stdout.splitlines()[-1])
    assert outcome["files"] == ["prototypes.json", "prototypes.safetensors", "state"]
    assert outcome["points"] >= 8  # three passes, state, end of the passes, end of the lock, prototypes, report
    assert outcome["differ"] == []
