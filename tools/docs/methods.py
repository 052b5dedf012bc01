"""docs/methods.md: every merge method of the package, from its declaration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mergekit_px.learn.declare import Learner
from mergekit_px.methods import load_methods
from mergekit_px.methods.declare import Method, method_slug
from tools.docs.fields import HEADER, field_rows
from tools.docs.markdown import docstring, table

_SPACES = {
    "weights": "full checkpoints",
    "deltas": "task vectors; the base is subtracted from full checkpoints",
    "any": "full checkpoints or task vectors",
}
_ACCESS = {
    "elementwise": "elementwise: one pass in chunks of any size",
    "two_pass": "two passes: a reduction over the tensor, then chunks of any size",
    "rows": "whole rows at a time",
    "tensor": "a whole tensor at a time",
}
_INTRODUCTION = """# Merge methods

Each method is a command (`pxmerge METHOD`), a `method:` in a [recipe](recipe.md), and a name for
[`merge_state_dicts`](api.md). Values of numeric parameters may be lists, which are interpolated over the layers.
Sums are taken in float32 at least and rounded once at the end.

"""


def methods_page() -> str:
    methods = own_methods()
    rows = [(f"[{name}](#{name})", docstring(method.summary), _paper(method)) for name, method in methods.items()]
    index = table(("method", "what it does", "source"), rows)
    return _INTRODUCTION + index + "".join(_method_section(method) for method in methods.values())


def own_methods() -> Mapping[str, Method]:
    """The methods that the package itself declares, without those of installed plug-ins."""
    return {name: method for name, method in load_methods().items() if is_own(method)}


def is_own(declared: Method | Learner) -> bool:
    return declared.origin.startswith("mergekit_px.")


def example_recipe(method: Method) -> str:
    """A recipe of one or two sources that runs as it stands where the folders that it names exist."""
    names = ["math"] if method.sources[1] == 1 else ["math", "code"]
    needs_base = method.space == "deltas"
    lines = ["pxmerge: 1", "models:"]
    lines += [f"  {name}: ./{name}" for name in (["base", *names] if needs_base else names)]
    if method.companions is not None:
        lines += [f"  {name}-statistics: ./{name}-statistics.safetensors" for name in names]
        names += [f"{name}-statistics" for name in names]
    lines += ["merge:", f"  method: {method.name}"]
    if needs_base:
        lines.append("  base: base")
    weighted = method.uses_weights and method.companions is None
    lines.append("  sources: {math: 0.6, code: 0.4}" if weighted else f"  sources: [{', '.join(names)}]")
    params = _example_params(method)
    if params:
        lines.append(f"  params: {{{', '.join(f'{name}: {json.dumps(value)}' for name, value in params.items())}}}")
    lines += ["output:", "  path: ./merged"]
    return "\n".join(lines) + "\n"


def _example_params(method: Method) -> dict[str, Any]:
    """The parameters that have to be given, by the example of their declaration; else a numeric one's default."""
    fields = method.params.model_fields
    required = {name: (field.examples or [None])[0] for name, field in fields.items() if field.is_required()}
    if required:
        return required
    numbers = {name: field.default for name, field in fields.items() if _is_telling(field.default)}
    return dict(list(numbers.items())[:1])


def _is_telling(default: Any) -> bool:
    """Whether a default is a number that one might want to change, not the factor 1."""
    return type(default) in (int, float) and default not in (0, 1)


def _method_section(method: Method) -> str:
    facts = [
        ("command", f"[`pxmerge {method_slug(method.name)}`](cli/{method_slug(method.name)}.md)"),
        ("merges", _SPACES[method.space]),
        ("sources", _count(method)),
        ("with", f"{method.companions.what} of each source, listed after all sources" if method.companions else ""),
        ("weights", f"{method.default_weight:g} where none is given" if method.uses_weights else "none"),
        ("reads", _ACCESS[method.access]),
        ("random", "yes, by the recipe's `seed`" if method.random else "no"),
        ("source", _paper(method)),
    ]
    parameters = list(field_rows(method.params, method.per_source_fields()))
    summary, _, rest = docstring(method.documentation).partition("\n\n")
    parts = [
        f"\n## {method.name}\n\n{summary}\n",
        "".join(f"- {name}: {value}\n" for name, value in facts if value),
        *([f"{rest}\n"] if rest else []),
        table(HEADER, parameters) if parameters else "It has no parameters.\n",
    ]
    if variants := _variants(method):
        parts.append(variants)
    parts.append(f"```yaml\n{example_recipe(method)}```\n")
    return "\n".join(parts)


def _variants(method: Method) -> str:
    rows = [
        (f"`like: {name}`", ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in values.items()))
        for name, values in method.presets.items()
        if values
    ]
    return table(("variant", "defaults that differ"), rows) if rows else ""


def _count(method: Method) -> str:
    least, most = method.sources
    return f"exactly {least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"


def _paper(method: Method) -> str:
    source = method.paper or ""
    for prefix, site in (("arXiv:", "https://arxiv.org/abs/"), ("doi:", "https://doi.org/")):
        if source.startswith(prefix):
            return f"[{source}]({site}{source.removeprefix(prefix)})"
    return f"<{source}>" if source.startswith("https://") else source
