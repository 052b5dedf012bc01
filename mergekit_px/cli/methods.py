"""``pxmerge methods``: the merge methods."""

from __future__ import annotations

from typing import Annotated, Any, get_args

import typer

from mergekit_px.cli._documents import MethodDocument, MethodsDocument
from mergekit_px.cli._options import Json
from mergekit_px.cli._output import Column, Output, output_for
from mergekit_px.cli._parameters import ParameterOption, parameter_options
from mergekit_px.cli._prose import paragraphs, plain, terminal_width
from mergekit_px.cli.method import example
from mergekit_px.declare.fields import in_words
from mergekit_px.methods import find_method, load_methods
from mergekit_px.methods.declare import Family, Method

Name = Annotated[str | None, typer.Argument(metavar="NAME", help="A method to explain.")]

_ACCESS = {
    "elementwise": "element by element",
    "two_pass": "in two passes",
    "rows": "row by row",
    "tensor": "whole tensors",
}

_FAMILIES: dict[Family, str] = {
    "average": "Averages and interpolations",
    "task vectors": "Task vectors",
    "spectral": "Singular values of task vectors",
    "federated": "Federated learning",
    "statistics": "With statistics of data",
    "building block": "Building blocks",
}
_TAKES = {"weights": "models", "deltas": "task vectors", "any": "models or task vectors"}


def methods(name: Name = None, json: Json = False) -> int:
    """List the merge methods, or explain one: its formula, parameters and paper.

    \b
    Examples:
      pxmerge methods
      pxmerge methods ties
    """
    output = output_for(json=json)
    if name is not None:
        _explain(find_method(name), output)
        return 0
    declared = list(load_methods().values())
    output.document([_facts(method) for method in declared], MethodsDocument)
    columns = [
        Column("method"),
        Column("what it does"),
        Column("takes", essential=False),
        Column("sources", "right", essential=False),
        Column("paper", essential=False),
    ]
    for family in get_args(Family):
        output.heading(_FAMILIES[family])
        rows = [
            (method.name, plain(method.summary), _TAKES[method.space], _sources(method), method.paper)
            for method in declared
            if method.family == family
        ]
        output.table(columns, rows)
    output.note("docs/choosing.md says which to try first; `pxmerge methods NAME` explains one")
    return 0


def _explain(method: Method, output: Output) -> None:
    options = parameter_options(method)
    output.document(_facts(method), MethodDocument)
    output.text(f"{method.name}\n")
    for paragraph in paragraphs(method.documentation, terminal_width()):
        output.text(f"{paragraph}\n")
    output.pairs(
        [
            ("takes", _TAKES[method.space]),
            ("sources", _sources(method)),
            ("reads", _ACCESS[method.access]),
            ("variants", ", ".join(f"like {name}" for name in method.presets) or None),
            ("paper", method.paper),
            ("declared in", method.origin),
        ]
    )
    if options:
        output.heading("Parameters")
        rows = [(option.name, option.default, _range(option), option.help) for option in options]
        output.table([Column("name"), Column("default"), Column("values", essential=False), Column("what")], rows)
    output.heading("Example")
    output.text(f"  {example(method, options)}")


def _facts(method: Method) -> dict[str, Any]:
    least, most = method.sources
    return {
        "name": method.name,
        "summary": method.summary,
        "documentation": method.documentation,
        "family": method.family,
        "takes": method.space,
        "access": method.access,
        "sources": {"least": least, "most": most},
        "uses_weights": method.uses_weights,
        "random": method.random,
        "variants": {name: dict(values) for name, values in method.presets.items()},
        "paper": method.paper,
        "origin": method.origin,
        "parameters": method.params.model_json_schema().get("properties", {}),
    }


def _sources(method: Method) -> str:
    least, most = method.sources
    if most is None:
        return f"{least} or more"
    return str(least) if least == most else f"{least} to {most}"


def _range(option: ParameterOption) -> str:
    parts = [*option.choices, *([in_words(option.bounds)] if option.bounds else [])]
    if option.kind == "flag":
        parts = ["true", "false"]
    if option.per_source:
        parts.append("one, or one for each source")
    return ", ".join(parts)
