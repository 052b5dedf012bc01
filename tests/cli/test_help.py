from __future__ import annotations

import re
import subprocess
import sys

import pytest

from mergekit_px.cli._commands import all_commands


@pytest.mark.parametrize("name", list(all_commands()))
def test_every_command_explains_itself(run, name: str) -> None:
    outcome = run(name, "--help")
    assert outcome.code == 0
    assert outcome.stderr == ""
    assert f"pxmerge {name} " in outcome.stdout.partition("Example")[2]


def test_overview(run) -> None:
    outcome = run("--help")
    assert outcome.code == 0
    assert outcome.stdout == run().stdout == run("-h").stdout


@pytest.mark.parametrize("name", ["", "ties", "run"])
def test_forty_columns_are_enough(run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = run(*name.split(), "--help").stdout
    prose = re.split(r"\n(?:Arguments|Merge|Learning|Output|Options):\n", text)[0]
    too_long = [line for line in prose.splitlines() if len(line) > 40 and "pxmerge" not in line]
    assert too_long == []


def test_every_option_has_a_help_text(run) -> None:
    for name in all_commands():
        options = re.split(r"\n(?:Merge|Learning|Output|Options):\n", run(name, "-h").stdout, maxsplit=1)[
            1
        ].splitlines()
        for this, following in zip(options, [*options[1:], ""], strict=True):
            if this.startswith("  -"):
                assert "  " in this.strip() or following.startswith(" " * 10), f"{name}: {this}"


HELP = "import sys; from mergekit_px.cli import main; main(sys.argv[1:]); "
HEAVY = "sys.exit(', '.join({packages} & set(sys.modules)) or 0)"
PACKAGES = {"torch", "numpy", "huggingface_hub", "transformers", "rich"}
DECLARATIONS = {"pydantic", "mergekit_px.methods", "mergekit_px.learn"}


@pytest.mark.parametrize(
    ("words", "more"),
    [
        ("--help", DECLARATIONS),
        ("ties --help", {"mergekit_px.methods.slerp", "mergekit_px.learn"}),
        ("run --help", {"mergekit_px.methods"}),
        ("inspect --help", {"mergekit_px.methods"}),
        ("doctor -h", {"mergekit_px.methods"}),
        ("nonsense", {"mergekit_px.methods"}),
    ],
)
def test_help_imports_nothing_heavy(words: str, more: set[str]) -> None:
    """Nor any declaration of a merge method or a learner that was not asked for."""
    code = HELP + HEAVY.format(packages=PACKAGES | more)
    finished = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
