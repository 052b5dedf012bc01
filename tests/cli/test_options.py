from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mergekit_px.cli._arguments import Several
from mergekit_px.cli._commands import all_commands
from mergekit_px.cli._options import RunOptions, flatten
from mergekit_px.cli.method import method_command
from mergekit_px.errors import UsageError
from mergekit_px.methods import declare
from mergekit_px.methods.declare import Params, merge_method


def test_fields_of_run_options_become_options_of_the_command() -> None:
    def command(recipe: str, options: RunOptions, extra: int = 1) -> Any:
        return recipe, options, extra

    flat = flatten(command)
    parameters = inspect.signature(flat).parameters
    assert next(iter(parameters)) == "recipe"
    assert list(parameters)[-1] == "extra"
    assert {"output", "memory", "dry_run"} <= set(parameters)
    given = {name: parameter.default for name, parameter in parameters.items()}
    recipe, options, extra = flat(**given | {"recipe": "r", "memory": "4GB"})
    assert (recipe, extra) == ("r", 1)
    assert options == RunOptions(memory="4GB")


def test_plan_options_say_the_same() -> None:
    found = RunOptions(
        output=Path("x"), memory="1.5GB", threads=3, overwrite=True, allow_pickle=True, no_hash_inputs=True
    ).plan_options()
    assert (found.output, found.memory, found.threads, found.mode) == (Path("x"), 1_500_000_000, 3, "overwrite")
    assert (found.allow_pickle, found.allow_nonfinite, found.hash_inputs) == (True, False, False)


def test_options_that_the_recipe_has_too_are_written_into_it() -> None:
    options = RunOptions(assignments=["seed=1"], dtype="float16", shard_size="1GB", push="a/b", private=True)
    assert options.overrides() == [
        "seed=1",
        "output.dtype=float16",
        "output.shard_size=1GB",
        "output.push={repo: 'a/b', private: true}",
    ]


def test_every_list_option_takes_several_words() -> None:
    for command in all_commands().values():
        for name, parameter in inspect.signature(command.load(), eval_str=True).parameters.items():
            annotation = str(parameter.annotation)
            is_option = "OptionInfo" in annotation
            if is_option and "list[str]" in annotation:
                assert any(isinstance(mark, Several) for mark in parameter.annotation.__metadata__), (
                    f"{command}: {name}"
                )


def test_a_parameter_may_not_hide_an_option_of_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(declare, "REGISTRY", {})

    class Clashing(Params):
        memory: float = 1.0

    def clash(sources: Sequence[Any], params: Any) -> Any:
        """A method."""

    clash.__annotations__["params"] = Clashing
    merge_method(space="weights", access="elementwise")(clash)
    with pytest.raises(ValueError, match="clash: memory is an option"):
        method_command(declare.REGISTRY["clash"])


def test_resume_and_overwrite_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="--resume keeps"):
        RunOptions(resume=True, overwrite=True).plan_options()
