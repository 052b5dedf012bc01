"""What every command that merges does with its recipe: plan, run, publish, report."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from mergekit_px.cli._errors import Interrupted
from mergekit_px.cli._options import RunOptions
from mergekit_px.cli._output import Output, output_for
from mergekit_px.cli._plan_view import show_plan
from mergekit_px.cli._progress import progress_on
from mergekit_px.cli._units import show_bytes, show_seconds

if TYPE_CHECKING:
    from mergekit_px.execute.events import RunResult
    from mergekit_px.plan.model import Plan
    from mergekit_px.recipe.load import LoadedRecipe


def merge_file(path: str, options: RunOptions) -> int:
    """Carry out a recipe file of either dialect."""
    from mergekit_px.plan.method_catalog import method_catalog
    from mergekit_px.recipe.load import load_recipe

    return merge(load_recipe(path, overrides=options.overrides(), methods=method_catalog()), options)


def merge_mapping(recipe: Mapping[str, Any], options: RunOptions) -> int:
    """Carry out a recipe given as data, as a method's command makes it."""
    from mergekit_px.plan.method_catalog import method_catalog
    from mergekit_px.recipe.load import recipe_from_mapping
    from mergekit_px.recipe.overrides import apply_overrides
    from mergekit_px.recipe.yaml_text import node_of

    changed = apply_overrides(node_of(recipe, "command line"), options.overrides()).data()
    return merge(recipe_from_mapping(changed, methods=method_catalog()), options)


def merge(loaded: LoadedRecipe, options: RunOptions) -> int:
    """Plan a recipe, carry it out, and publish it if that is asked for; with ``--dry-run`` only show the plan."""
    from mergekit_px.plan.build import build_plan

    output = output_for(json=options.json, quiet=options.quiet)
    plan = build_plan(loaded, options.plan_options())
    if options.dry_run:
        show_plan(plan, output)
        return 0
    for note in plan.notes:
        output.note(f"note: {note}")
    result = _run(plan, output)
    address = _publish(plan, result, output)
    _report(result, plan, address, output)
    return 0


def _run(plan: Plan, output: Output) -> RunResult:
    from mergekit_px.execute.run import run_plan

    with progress_on(output) as advance:
        try:
            return run_plan(plan, progress=lambda state: advance(state.phase, state.bytes_done, state.bytes_total))
        except KeyboardInterrupt:
            raise Interrupted from None


def _publish(plan: Plan, result: RunResult, output: Output) -> str | None:
    """The address of the upload; None where the recipe asks for none."""
    push = plan.loaded.recipe.output.push
    if push is None:
        return None
    from mergekit_px.hub.publish import publish

    with progress_on(output) as advance:
        return publish(
            result.output,
            push.repo,
            private=push.private,
            revision=push.revision,
            message="Merge with pxmerge",
            progress=partial(advance, "uploading"),
        )


def _report(result: RunResult, plan: Plan, address: str | None, output: Output) -> None:
    moved = f"{show_bytes(result.bytes_read)} read, {show_bytes(result.bytes_written)} written"
    output.note(f"{len(plan.items)} tensors in {show_seconds(result.seconds)}: {moved}")
    if result.achieved is not None and result.bound_seconds is not None:
        bound = show_seconds(result.bound_seconds)
        output.note(f"{result.achieved:.0%} of what this machine can move (bound {bound})")
    if result.peak_memory:
        output.note(f"peak memory {show_bytes(result.peak_memory)}")
    if address is not None:
        output.note(f"uploaded to {address}")
    output.text(str(result.output))
    output.document(
        {
            "output": str(result.output),
            "files": dict(result.files),
            "tensors": len(plan.items),
            "seconds": result.seconds,
            "bytes_read": result.bytes_read,
            "bytes_written": result.bytes_written,
            "seconds_bound": result.bound_seconds,
            "achieved": result.achieved,
            "peak_memory": result.peak_memory,
            "pushed": address,
            "notes": list(result.notes),
        }
    )
