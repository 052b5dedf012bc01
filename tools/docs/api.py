"""docs/api.md: every name of ``mergekit_px.__all__`` with its signature and docstring."""

from __future__ import annotations

import inspect
import json
from typing import Any

import mergekit_px
import mergekit_px.testing
from tools.docs.markdown import docstring, signature

_INTRODUCTION = """# Python

    import mergekit_px

Importing it does not import torch; the functions that compute do. [A notebook](notebook.ipynb) goes through the usual
calls.
"""

_TESTING = """
# Testing

`mergekit_px.testing` is for tests of merges and of merge methods, in other packages too.
"""


def api_page() -> str:
    names = sorted(mergekit_px.__all__, key=str.lower)
    text = _INTRODUCTION + "".join(_section(name, getattr(mergekit_px, name)) for name in names)
    helpers = ((f"testing.{name}", getattr(mergekit_px.testing, name)) for name in mergekit_px.testing.__all__)
    return text + _TESTING + "".join(_section(name, found) for name, found in helpers)


def _section(name: str, found: Any) -> str:
    heading = f"\n## {name}\n\n"
    if inspect.isclass(found):
        return heading + _class_text(name, found)
    if callable(found):
        return heading + _code(signature(name.rpartition(".")[2], found)) + _documentation(found)
    return heading + _code(f"{name} = {json.dumps(found)}")


def _class_text(name: str, found: type) -> str:
    parts = [
        _code(
            f"class {signature(name, found).removesuffix(' -> None')}" if _is_constructed(found) else f"class {name}"
        ),
        _documentation(found),
    ]
    for member, value in vars(found).items():
        function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if member.startswith("_") or not inspect.getdoc(value):
            continue
        if inspect.isfunction(function):
            parts += [f"\n### {name}.{member}\n\n", _code(signature(member, function)), _documentation(function)]
        elif isinstance(value, property):
            parts += [f"\n### {name}.{member}\n", _documentation(value)]
    return "".join(parts)


def _is_constructed(found: type) -> bool:
    return not issubclass(found, BaseException) and found.__init__ is not object.__init__


def _code(text: str) -> str:
    return f"```python\n{text}\n```\n"


def _documentation(found: Any) -> str:
    documentation = inspect.getdoc(found)
    return f"\n{docstring(documentation)}\n" if documentation else ""
