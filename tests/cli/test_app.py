from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mergekit_px._version import __version__
from mergekit_px.cli import main
from mergekit_px.cli._errors import Interrupted, explain
from mergekit_px.errors import MemoryBudgetError, NonFiniteError, PxmergeError, RecipeError


def pxmerge(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mergekit_px", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
    )


def test_version(run) -> None:
    assert run("--version").stdout == f"pxmerge {__version__}\n"


def test_without_words_the_overview_is_printed(run) -> None:
    outcome = run()
    assert outcome.code == 0
    assert "Recipes:" in outcome.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tiess --sources a", "Did you mean 'ties'"),
        ("inspekt a", "Did you mean 'inspect'"),
        ("ties --sourcse a", "--sources"),
        ("ties", "--sources"),
        ("ties --sources", "--sources needs at least one value"),
        ("ties --sources a --trim-scope mode", "'mode' is not one of 'model', 'tensor'"),
        ("ties --sources a --weights much", "--weights: 'much' is not a number"),
        ("ties --sources a --weights 1 much", "'much' is out of place: --weights takes numbers, one after another"),
        ("run", "RECIPE"),
        ("run a.yaml b.yaml", "b.yaml"),
        ("--versio", "--version"),
        ("plan r.yaml --threads 0", "--threads"),
    ],
)
def test_a_slip_is_one_line_that_says_what_is_right(run, words: str, message: str) -> None:
    outcome = run(*words.split())
    assert outcome.code == 2
    assert outcome.stdout == ""
    assert message in outcome.stderr
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1


def test_a_group_alone_lists_its_commands(run) -> None:
    outcome = run("adapter")
    assert outcome.code == 0
    assert "extract" in outcome.stdout and "convert" in outcome.stdout


def test_underscores_in_a_command_are_dashes(run) -> None:
    assert run("task_arithmetic", "--help").stdout == run("task-arithmetic", "--help").stdout


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RecipeError("no", where="r.yaml:1:2"), 2, "error: r.yaml:1:2: no"),
        (MemoryBudgetError("much", hint="less"), 4, "error: much; less"),
        (NonFiniteError("NaN"), 5, "error: NaN"),
        (PxmergeError("a\n  b"), 1, "error: a b"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("x\ny"), 1, "error: unexpected ZeroDivisionError: x y; PXMERGE_DEBUG=1 shows the traceback"),
        (OSError(28, "No space left on device"), 5, "error: the system refuses: No space left on device"),
        (OSError(36, "File name too long", "x\ny"), 5, "error: x\\ny: the system refuses: File name too long"),
        (MemoryError(), 1, "error: unexpected MemoryError; PXMERGE_DEBUG=1 shows the traceback"),
    ],
)
def test_errors_become_one_line_and_a_code(error: BaseException, code: int, line: str) -> None:
    assert explain(error, ["run", "r.yaml"]) == (code, line)


def test_an_interrupted_run_says_how_to_go_on() -> None:
    words = ["ties", "--sources", "a b", "--overwrite", "-o", "x"]
    assert explain(Interrupted(), words) == (
        130,
        "interrupted; to go on: pxmerge ties --sources 'a b' -o x --resume",
    )


def test_an_interrupted_upload_says_how_to_go_on() -> None:
    error = Interrupted(["push", "out", "org/name"])
    assert explain(error, ["run", "r.yaml"])[1] == "interrupted; to go on: pxmerge push out org/name"


def test_a_traceback_only_where_it_is_asked_for(run, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = run("inspect", "./nowhere")
    monkeypatch.setenv("PXMERGE_DEBUG", "1")
    loud = run("inspect", "./nowhere")
    assert quiet.code == loud.code == 3
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in loud.stderr
    assert loud.stderr.endswith(quiet.stderr)


def test_the_module_exits_with_the_code() -> None:
    assert pxmerge("inspect", "./nowhere").returncode == 3
    assert pxmerge("--version").returncode == 0


@pytest.mark.parametrize("words", ["methods", "methods ties --json", "--help", "--version"])
@pytest.mark.skipif(os.name == "nt", reason="pipes close differently")
def test_a_closed_pipe_is_no_error(words: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    finished = subprocess.run(
        [sys.executable, "-m", "mergekit_px", *words.split()],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(writing)
    assert finished.stderr == ""
    assert finished.returncode == 0


@pytest.mark.parametrize(("words", "code"), [("methods x 2>&-", 2), ("methods <&- >&- 2>&-", 0)])
@pytest.mark.skipif(os.name == "nt", reason="a shell closes the streams")
def test_closed_streams_are_no_error(words: str, code: int) -> None:
    line = f'"{sys.executable}" -c "from mergekit_px.cli import run; run()" {words}'
    finished = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60)
    assert finished.returncode == code
    assert "rror" not in finished.stderr


def test_main_leaves_stdout_as_it_found_it(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    main(["--help"])
    main(["nonsense"])
    assert (sys.stdout, sys.stderr) == before


def test_no_colour_reaches_a_pipe() -> None:
    for extra in ({}, {"GITHUB_ACTIONS": "true"}, {"TERM": "dumb"}):
        finished = pxmerge("methods", "ties", **extra)
        assert "\x1b" not in finished.stdout + finished.stderr


def test_completion_knows_commands_and_their_options() -> None:
    def completed(line: str) -> str:
        count = len(line.split(" ")) - 1
        variables = {"_PXMERGE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(count)}
        return pxmerge(**variables).stdout

    assert "task-arithmetic" in completed("pxmerge task-").split()
    assert "--density" in completed("pxmerge ties --d").split()


def test_ctrl_c_ends_a_command_with_130() -> None:
    program = (
        "import os, signal, threading; from mergekit_px.cli import app\n"
        "import mergekit_px.plan.inputs as source\n"
        "def wait(*a, **k): signal.raise_signal(signal.SIGINT)\n"
        "source.open_input = wait\n"
        "raise SystemExit(app.main(['inspect', 'x']))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stderr) == (130, "interrupted\n")
