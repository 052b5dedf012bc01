"""``pxmerge METHOD``: one command for each merge method, made from its declaration."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mergekit_px.cli._merge import merge_mapping
from mergekit_px.cli._options import MERGE, METHOD, RunOptions, Sources, Weights
from mergekit_px.cli._parameters import ParameterOption, choice, parameter_options, parse_numbers
from mergekit_px.cli._prose import paragraphs, terminal_width
from mergekit_px.errors import UsageError
from mergekit_px.methods.declare import Method, check_source_count, method_slug
from mergekit_px.recipe.naming import model_names

BaseOfDeltas = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="MODEL",
        help="The model that the sources were fine-tuned from. If left out: the one that their cards name."
        " `mean` is the mean of the sources.",
        rich_help_panel=MERGE,
    ),
]
BaseOfWeights = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="MODEL",
        help="The model that gives config, tokenizer and what --missing asks for.",
        rich_help_panel=MERGE,
    ),
]
Missing = Annotated[
    Literal["error", "present", "base"],
    typer.Option(
        "--missing",
        help="A tensor that only some inputs have: refuse, merge it over those that have it, or take the base's.",
        rich_help_panel=MERGE,
    ),
]
Vocabulary = Annotated[
    Literal["error", "truncate"],
    typer.Option(
        "--vocabulary", help="Embeddings of different length: refuse, or keep the common rows.", rich_help_panel=MERGE
    ),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the random numbers.", rich_help_panel=MERGE)]

_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def method_command(method: Method) -> Callable[..., int]:
    """The function of a method's command, whose signature holds the method's parameters as options."""
    options = parameter_options(method)
    reserved = {"base", "sources", "weights", "like", "seed", "missing", "vocabulary"}
    reserved |= {field.name for field in dataclasses.fields(RunOptions)}
    if clash := reserved & {option.name for option in options}:
        raise ValueError(f"{method.name}: {sorted(clash)[0]} is an option of every method's command")

    def command(**given: Any) -> int:
        run = given.pop("options")
        return merge_mapping(method_recipe(method, options, given), run)

    command.__doc__ = _help(method, options)
    command.__signature__ = inspect.Signature(_parameters(method, options))  # type: ignore[attr-defined]
    return command


def _parameters(method: Method, options: Sequence[ParameterOption]) -> list[inspect.Parameter]:
    def parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
        return inspect.Parameter(name, _KEYWORD, default=default, annotation=annotation)

    base = BaseOfDeltas if method.space == "deltas" else BaseOfWeights
    parameters = [parameter("sources", Sources), parameter("base", base, None)]
    if method.uses_weights:
        parameters.append(parameter("weights", Weights, None))
    parameters += [option.as_parameter() for option in options]
    if method.presets:
        option = typer.Option("--like", help="Start from another implementation's variant.", rich_help_panel=METHOD)
        parameters.append(parameter("like", Annotated[choice(list(method.presets)) | None, option], None))
    if method.random:
        parameters.append(parameter("seed", Seed, 0))
    parameters += [parameter("missing", Missing, "error"), parameter("vocabulary", Vocabulary, "error")]
    return [*parameters, parameter("options", RunOptions)]


def method_recipe(method: Method, options: Sequence[ParameterOption], given: dict[str, Any]) -> dict[str, Any]:
    """The recipe that the command line means. Raises ``UsageError``."""
    references: list[str] = given["sources"]
    for reference in references:
        if "," in reference and not Path(reference).exists():
            apart = reference.replace(",", " ")
            raise UsageError(
                f"--sources: there is no '{reference}'", hint=f"separate models by spaces: --sources {apart}"
            )
    check_source_count(method, len(references))
    mean = given["base"] == "mean" and method.space == "deltas"
    base_reference: Any = None if mean else given["base"]
    names = model_names([*([] if base_reference is None else [base_reference]), *references])
    base = names.pop(0) if base_reference is not None else None
    models = dict(zip(names, references, strict=True))
    step: dict[str, Any] = {"method": method.name, "sources": names}
    if base is not None:
        models = {base: base_reference, **models}
        step["base"] = base
    elif mean:
        step["base"] = "mean"
    if given.get("weights"):
        models_only = names[: len(names) // 2] if method.companions is not None else names
        step["sources"] = dict.fromkeys(names) | dict(
            zip(models_only, _weights(given["weights"], len(models_only)), strict=True)
        )
    params = {
        option.name: option.value(given[option.name], names) for option in options if given[option.name] is not None
    }
    if params:
        step["params"] = params
    if given.get("like"):
        step["like"] = given["like"]
    step |= {key: given[key] for key in ("missing", "vocabulary") if given[key] != "error"}
    recipe: dict[str, Any] = {"pxmerge": 1, "models": models, "merge": step}
    if given.get("seed"):
        recipe["seed"] = given["seed"]
    return recipe


def _weights(words: Sequence[str], count: int) -> list[Any]:
    if len(words) == 1 and words[0].count(",") == count - 1 > 0:
        apart = words[0].replace(",", " ")
        raise UsageError(
            f"--weights: {words[0]} is one weight that varies over the layers, and there are {count} sources",
            hint=f"for one weight each, separate them by spaces: --weights {apart}",
        )
    numbers = [parse_numbers(word, "--weights") for word in words]
    if len(words) != count:
        few = "1 value" if len(words) == 1 else f"{len(words)} values"
        raise UsageError(f"--weights has {few} for {count} sources", hint="give one for each source")
    return numbers


def _help(method: Method, options: Sequence[ParameterOption]) -> str:
    blocks = paragraphs(method.documentation, terminal_width() - 2)  # Typer indents by two.
    if method.paper:
        blocks.append(f"Paper: {method.paper}")
    blocks.append(f"Example:\n  {example(method, options)}")
    # A paragraph that begins with \\b is printed as it is.
    return "\n\n".join(f"\b\n{block}" for block in blocks)


def example(method: Method, options: Sequence[ParameterOption]) -> str:
    """A command line that works for the method, given such folders."""
    least, most = method.sources
    count = max(least, 1) if most == least else max(least, 2)
    words = ["pxmerge", method_slug(method.name)]
    if method.space == "deltas":
        words += ["--base", "./base"]
    sources = [f"./{name}" for name in ("math", "code", "chat", "law")[:count]]
    words += ["--sources", *sources]
    if method.companions is not None:
        words += [f"{source}-statistics.safetensors" for source in sources]
    if method.uses_weights and count == 2:
        words += ["--weights", "0.6", "0.4"]
    classes = [one for one in method.params.__mro__ if one.__module__ == method.origin]
    own = [option for one in classes for option in options if option.name in one.__annotations__]
    for option in own:  # Those that it shares with its family say less about it.
        if option.words:
            words += [option.flag, "64"]
            break
        if option.kind == "numbers" and option.bounds and isinstance(option.default, (int, float)):
            words += [option.flag, f"{option.default:g}"]
            break
    return " ".join(words)
