"""Merge methods, one file each, and the registry that finds them.

Methods of other packages are found through the entry-point group ``pxmerge.methods``: each entry point names a
module whose import declares methods with :func:`merge_method`.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from mergekit_px.declare.built_in import METHODS
from mergekit_px.errors import UsageError
from mergekit_px.methods.declare import REGISTRY, Method, Params, merge_method
from mergekit_px.plug_ins import load_plug_ins
from mergekit_px.python_values import check_kind

__all__ = ["Method", "Params", "find_method", "load_methods", "merge_method"]


@cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    load_plug_ins("pxmerge.methods")


def load_methods() -> Mapping[str, Method]:
    """All methods by name, in alphabetical order. Imports their modules, none of which imports torch."""
    _import_all()
    return dict(sorted(REGISTRY.items()))


def find_method(name: str) -> Method:
    """The method of that name (``task-arithmetic`` and ``task_arithmetic`` are one). Imports no other one if it can.

    Raises:
        UsageError: no such method; the message has the nearest names.
    """
    check_kind("a merge method", name, str, "its name")
    known = METHODS.get(name.replace("-", "_"))
    if known is not None:
        importlib.import_module(known.module)
    else:
        _import_all()
    method = REGISTRY.get(name.replace("-", "_"))
    if method is None:
        methods = load_methods()
        near = difflib.get_close_matches(name.replace("-", "_"), methods, n=1)
        raise UsageError(
            f"unknown merge method '{name}'",
            hint=f"did you mean '{near[0]}'?" if near else f"known are {', '.join(methods)}",
        )
    return method
