"""Every command: a table of names and where each one's function is. Nothing is imported until it is asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from mergekit_px.cli._options import flatten
from mergekit_px.declare import built_in

RECIPES = "Recipes"
METHODS = "Methods"
TASK_VECTORS = "Task vectors"
ADAPTERS = "Adapters"
LEARNING = "Learn from data"
INSPECTION = "Look and check"
HUB = "Hub"
ABOUT = "About"

USUAL = ("linear", "slerp", "task-arithmetic", "ties", "tsv-m", "svd")
"""The methods that ``pxmerge --help`` lists: an average, an interpolation, the two that everyone knows, and the
spectral ones that the quality suite puts ahead without data. ``pxmerge methods`` has all."""

GROUPS = (RECIPES, METHODS, TASK_VECTORS, ADAPTERS, LEARNING, INSPECTION, HUB, ABOUT)
"""The order of the groups in ``pxmerge --help``."""


@dataclass(frozen=True, slots=True)
class Command:
    """A row of the table.

    Attributes:
        name: as typed; of several words for a command of a group, such as ``adapter apply``.
        summary: one line for ``pxmerge --help``.
        place: ``module:function`` below this package, or None for a command made from the declaration of a
            merge method or a learner.
    """

    name: str
    group: str
    summary: str
    place: str | None = None

    def load(self) -> Callable[..., Any]:
        """The command's function, with every option a parameter."""
        if self.place is None:
            if self.group == LEARNING:
                from mergekit_px.cli.learner import learner_command
                from mergekit_px.learn import find_learner

                return learner_command(find_learner(self.name))
            from mergekit_px.cli.method import method_command
            from mergekit_px.methods import find_method

            return flatten(method_command(find_method(self.name)))
        module, _, function = self.place.partition(":")
        return flatten(getattr(importlib.import_module(f"mergekit_px.cli.{module}"), function))


_TABLE = (
    Command("run", RECIPES, "Run a recipe.", "run:run"),
    Command("plan", RECIPES, "Say what a recipe would read, compute and write.", "plan:plan"),
    Command("lock", RECIPES, "Pin every input of a recipe.", "lock:lock"),
    Command("publish", RECIPES, "Put the parts of a job array together.", "publish:publish"),
    Command("average", RECIPES, "Average the checkpoints of one training run.", "average:average"),
    Command("convert", RECIPES, "Translate a mergekit config into a recipe.", "convert:convert"),
    Command("tokens transplant", RECIPES, "Give a model another one's tokenizer.", "tokens_transplant:transplant"),
    Command("moe build", RECIPES, "Build a mixture of experts of dense models.", "moe_build:build"),
    Command("moe edit", RECIPES, "Keep, drop, reorder or merge the experts of a mixture.", "moe_edit:edit"),
    Command("schema", RECIPES, "Print the JSON Schema of recipes.", "schema:schema"),
    Command("add", TASK_VECTORS, "Add task vectors to a model.", "task_vectors:add"),
    Command("subtract", TASK_VECTORS, "Take the task vector of a fine-tune, or remove one.", "task_vectors:subtract"),
    Command("negate", TASK_VECTORS, "Turn a task vector, or a fine-tune, the other way.", "task_vectors:negate"),
    Command("scale", TASK_VECTORS, "Make a task vector, or a fine-tune, stronger or weaker.", "task_vectors:scale"),
    Command("analogy", TASK_VECTORS, "A is to B as C is to the result.", "task_vectors:analogy"),
    Command("adapter apply", ADAPTERS, "Put adapters into a base model.", "adapter_apply:apply"),
    Command("adapter merge", ADAPTERS, "Make one adapter, or a model, of several adapters.", "adapter_merge:merge"),
    Command("adapter extract", ADAPTERS, "Take an adapter out of a fine-tune.", "adapter_extract:extract"),
    Command("adapter convert", ADAPTERS, "Write an adapter in another format.", "adapter_convert:convert"),
    Command("adapter inspect", ADAPTERS, "Show what an adapter holds and whether it fits.", "adapter_inspect:inspect"),
    Command("acmap merge", ADAPTERS, "Keep the running mean of the adapters of many tasks.", "acmap_merge:merge"),
    Command("acmap export", LEARNING, "Write prototypes as a linear head, or a merged adapter.", "acmap_export:export"),
    Command("pairs", LEARNING, "List the tensors that a transfer can pair.", "pairs:pairs"),
    Command("data", LEARNING, "Write the arrays that learning would make of texts or images.", "data:data"),
    Command("inspect", INSPECTION, "Show what a checkpoint holds, from its headers.", "inspect:inspect"),
    Command("compare", INSPECTION, "Measure how models differ, tensor by tensor.", "compare:compare"),
    Command("report", INSPECTION, "Write what a merge was as one HTML page.", "report:report"),
    Command("advise", INSPECTION, "Say what to try first with some models.", "advise:advise"),
    Command("verify", INSPECTION, "Check every byte of a merged model against its lock file.", "verify:verify"),
    Command("pull", HUB, "Download a model, pinned to a commit.", "pull:pull"),
    Command("push", HUB, "Upload a model in one commit.", "push:push"),
    Command("methods", ABOUT, "List the merge methods, or explain one.", "methods:methods"),
    Command("doctor", ABOUT, "Show versions, hardware and measured speeds.", "doctor:doctor"),
    Command("demo", ABOUT, "Train, merge and score small models on real data.", "demo:demo"),
)

_OWN_OPTIONS = {"svd": "svd:svd"}
"""Merge methods whose commands have options beside those of the declaration, and where those commands are."""


@cache
def own_commands() -> Mapping[str, Command]:
    """All of this package, whose methods and learners have names of their own."""
    learners = (Command(name, LEARNING, declared.summary) for name, declared in built_in.LEARNERS.items())
    methods = (_of_method(name, declared.summary) for name, declared in built_in.METHODS.items())
    return {command.name: command for command in (*learners, *_TABLE, *methods)}


def _of_method(name: str, summary: str) -> Command:
    return Command(name.replace("_", "-"), METHODS, summary, _OWN_OPTIONS.get(name))


def _plugged_in() -> Iterator[Command]:
    """Those of other packages and of files of the user's; without any, no declaration is imported."""
    groups = entry_points().groups
    if "pxmerge.methods" in groups or "mergekit_px.methods" in sys.modules:
        from mergekit_px.methods import load_methods

        yield from (_of_method(name, method.summary) for name, method in load_methods().items())
    if "pxmerge.learners" in groups or "mergekit_px.learn" in sys.modules:
        from mergekit_px.learn import load_learners

        yield from (Command(name, LEARNING, learner.summary) for name, learner in load_learners().items())


def all_commands() -> Mapping[str, Command]:
    """All commands by name, group by group; a plug-in never hides a command of this package."""
    own = own_commands()
    every = [*own.values(), *(command for command in _plugged_in() if command.name not in own)]
    return {command.name: command for group in GROUPS for command in every if command.group == group}


def find_command(name: str) -> Command | None:
    """A command by its name as typed, or None. Plug-ins are looked at only where it is not one of ours."""
    called = name.replace("_", "-")
    return own_commands().get(called) or all_commands().get(called)


def spoken_command(words: Sequence[str]) -> tuple[Command, range] | None:
    """The command that a command line names, and where in it its words are; of two that fit, the longer name."""
    start = next((index for index, word in enumerate(words) if not word.startswith("-")), len(words))
    for count in (2, 1):
        command = find_command(" ".join(words[start : start + count])) if start + count <= len(words) else None
        if command is not None:
            return command, range(start, start + count)
    return None


def spoken_name(words: Sequence[str]) -> str:
    """The command that a command line names, or the group of commands, or nothing."""
    found = spoken_command(words)
    if found is not None:
        return found[0].name
    return words[0] if words and any(command.name.startswith(f"{words[0]} ") for command in _TABLE) else ""
