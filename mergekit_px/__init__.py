"""pxmerge: streamed model merging on checkpoint files.

    import mergekit_px as px

    px.merge(["a", "b"], "ties", base="base", weights=[0.6, 0.4], density=0.3, output="merged")
    px.run_recipe("recipe.yaml", output="merged")
    px.plan_recipe("recipe.yaml")
    px.run_learner("ofasd", base="base", sources=["a", "b"], data="few.jsonl", output="coefficients")
    px.run_command("adapter extract", "base", "math", rank=32, output="math-lora")

Names are imported when they are first used, so that ``import mergekit_px`` is quick and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mergekit_px._version import __version__

if TYPE_CHECKING:
    from mergekit_px.checkpoint.open import Checkpoint, open_checkpoint
    from mergekit_px.cli.call import run_command
    from mergekit_px.errors import PxmergeError
    from mergekit_px.execute.events import Progress, RunResult
    from mergekit_px.execute.run import run_plan
    from mergekit_px.inspection.models import advise, compare, inspect, verify
    from mergekit_px.learn.life import run_learner
    from mergekit_px.merging import merge, plan_recipe, run_recipe
    from mergekit_px.methods import Method, find_method, load_methods
    from mergekit_px.methods.declare import Params, PerSource, merge_method
    from mergekit_px.plan.build import build_plan
    from mergekit_px.plan.model import Plan
    from mergekit_px.plan.options import PlanOptions
    from mergekit_px.plan.report import plan_report
    from mergekit_px.recipe.load import load_recipe, parse_recipe
    from mergekit_px.recipe.loaded import LoadedRecipe
    from mergekit_px.recipe.model import Recipe
    from mergekit_px.state_dicts import merge_state_dicts

_HOMES = {
    "advise": "inspection.models",
    "build_plan": "plan.build",
    "compare": "inspection.models",
    "Checkpoint": "checkpoint.open",
    "LoadedRecipe": "recipe.loaded",
    "Method": "methods",
    "Params": "methods.declare",
    "PerSource": "methods.declare",
    "Plan": "plan.model",
    "PlanOptions": "plan.options",
    "Progress": "execute.events",
    "PxmergeError": "errors",
    "Recipe": "recipe.model",
    "RunResult": "execute.events",
    "find_method": "methods",
    "inspect": "inspection.models",
    "load_methods": "methods",
    "load_recipe": "recipe.load",
    "merge": "merging",
    "merge_method": "methods.declare",
    "merge_state_dicts": "state_dicts",
    "open_checkpoint": "checkpoint.open",
    "parse_recipe": "recipe.load",
    "plan_recipe": "merging",
    "plan_report": "plan.report",
    "run_command": "cli.call",
    "run_recipe": "merging",
    "run_learner": "learn.life",
    "run_plan": "execute.run",
    "verify": "inspection.models",
}

__all__ = [
    "Checkpoint",
    "LoadedRecipe",
    "Method",
    "Params",
    "PerSource",
    "Plan",
    "PlanOptions",
    "Progress",
    "PxmergeError",
    "Recipe",
    "RunResult",
    "__version__",
    "advise",
    "build_plan",
    "compare",
    "find_method",
    "inspect",
    "load_methods",
    "load_recipe",
    "merge",
    "merge_method",
    "merge_state_dicts",
    "open_checkpoint",
    "parse_recipe",
    "plan_recipe",
    "plan_report",
    "run_command",
    "run_learner",
    "run_plan",
    "run_recipe",
    "verify",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
