"""What is learned from data, and the registry that finds the learners.

Learners of other packages are found through the entry-point group ``pxmerge.learners``: each entry point names a
module whose import declares learners with ``mergekit_px.learn.declare.learner``. None of these modules imports torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache

from mergekit_px.declare.built_in import LEARNERS
from mergekit_px.errors import UsageError
from mergekit_px.learn.declare import REGISTRY, Learner
from mergekit_px.located.nearest import hint_for
from mergekit_px.plug_ins import load_plug_ins
from mergekit_px.python_values import check_kind

BUILT_IN = ("align", "ofasd", "tune", "search", "stats", "regmean_order", "transfer", "acmap")
"""Where the learners of this package are declared, in the order in which they are listed."""


@cache
def _import_all() -> None:
    for module in BUILT_IN:
        importlib.import_module(f"{__name__}.{module}")
    load_plug_ins("pxmerge.learners")


def load_learners() -> Mapping[str, Learner]:
    """All learners by name. Imports their declarations, none of which imports torch."""
    _import_all()
    return REGISTRY


def find_learner(name: str) -> Learner:
    """The learner of that name. Raises ``UsageError`` with the nearest names where there is none."""
    check_kind("a learner", name, str, "its name")
    called = name.replace("_", "-")
    if called in LEARNERS:
        importlib.import_module(LEARNERS[called].module)
        return REGISTRY[called]
    known = load_learners()
    if called not in known:
        raise UsageError(f"unknown learner '{name}'", hint=hint_for(called, known))
    return known[called]
