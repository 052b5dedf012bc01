"""Which methods the demo runs, and how."""

from __future__ import annotations

from pathlib import Path

from mergekit_px.demo import LEFT_OUT, merge_commands
from mergekit_px.demo.tasks import TASKS
from mergekit_px.methods import load_methods


def test_every_method_that_merges_is_in_the_demo() -> None:
    names = [command.output.name for command in merge_commands(Path("demo"), TASKS)]
    able = {
        name
        for name, method in load_methods().items()
        if method.sources[1] != 1
        and method.companions is None
        and not any(field.is_required() for field in method.params.model_fields.values())
    }
    assert set(names) == able - LEFT_OUT and len(names) == len(set(names))


def test_each_command_takes_what_its_method_takes() -> None:
    for command in merge_commands(Path("demo"), TASKS):
        name = command.output.name
        method = load_methods()[name]
        at = command.arguments.index("--sources") + 1
        sources = [word for word in command.arguments[at : at + 4] if Path(word).name in TASKS]
        least, most = method.sources
        assert max(least, 2) <= len(sources) <= (most or 4)
        assert ("--base" in command.arguments) == (method.space == "deltas")
