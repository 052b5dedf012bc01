"""What every command that merges does with its recipe: plan, run, publish, report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_px.cli._documents import PartDocument, PlansDocument, RunDocument, RunsDocument
from mergekit_px.cli._errors import PROGRAM, Interrupted
from mergekit_px.cli._options import RunOptions
from mergekit_px.cli._output import Output, output_for
from mergekit_px.cli._plan_view import show_plan
from mergekit_px.cli._progress import progress_on
from mergekit_px.cli._report import check_page, report_run
from mergekit_px.cli._units import show_bytes, show_seconds
from mergekit_px.errors import HubError, UsageError
from mergekit_px.stages import timed

if TYPE_CHECKING:
    from mergekit_px.execute.events import RunResult
    from mergekit_px.plan.inputs import ResolvedInput
    from mergekit_px.plan.model import Plan
    from mergekit_px.recipe.loaded import LoadedRecipe
    from mergekit_px.recipe.model import Push


def merge_file(
    path: str,
    options: RunOptions,
    *,
    part: str | None = None,
    cluster: str | None = None,
    workers: Sequence[int] = (),
    locked: bool = False,
) -> int:
    """Run a recipe file of either dialect, here or on a cluster, or one part of it.

    ``locked``: with the inputs of its lock file; ``workers``: that its plan is shared out among.
    """
    from mergekit_px.checkpoint.destination import LOCK_FILE
    from mergekit_px.plan.method_catalog import method_catalog
    from mergekit_px.recipe.load import load_recipe

    loaded = load_recipe(path, overrides=options.overrides(), methods=method_catalog())
    if locked and loaded.recipe.lock is None:
        loaded = replace(loaded, recipe=loaded.recipe.model_copy(update={"lock": LOCK_FILE}))
    if part is None:
        return merge(loaded, options, cluster=cluster, workers=workers)
    if cluster is not None:
        raise UsageError("--part is one job of an array, and --cluster all of them", hint="give one of them")
    return _merge_part(loaded, options, part)


def _merge_part(loaded: LoadedRecipe, options: RunOptions, part: str) -> int:
    """One part of a merge, for ``pxmerge publish`` to put in place."""
    from mergekit_px.execute.array import parse_part, run_part
    from mergekit_px.plan.build import build_plan

    output = output_for(json=options.json, quiet=options.quiet)
    refuse_report(options, "a part is not the whole")
    number, count = parse_part(part)
    if loaded.recipe.output.push is not None:
        raise UsageError("a part is not pushed", hint="push the whole after pxmerge publish")
    # Room is wanted for the part, not for the whole.
    plan = build_plan(loaded, replace(options.plan_options(), require_room=False))
    if options.dry_run:
        show_plan(plan, output)
        return 0
    for note in plan.notes:
        output.note(f"note: {note}")
    with progress_on(output) as advance:
        try:
            result = run_part(
                plan, number, count, progress=lambda state: advance(state.phase, state.bytes_done, state.bytes_total)
            )
        except KeyboardInterrupt:
            raise Interrupted from None
    if result is None:
        shards = len(plan.layout.shards)
        output.note(f"part {number} of {count} has nothing to do: the output has {shards} files (see --shard-size)")
        output.document({"part": number, "of": count, "files": {}}, PartDocument)
        return 0
    if result.up_to_date:
        output.note(f"part {number} of {count} is there already")
    _report(result, plan, None, output)
    return 0


def merge_mapping(recipe: Mapping[str, Any], options: RunOptions) -> int:
    """Run a recipe given as data, as a method's command makes it."""
    return merge(load_mapping(recipe, options), options)


def load_mapping(recipe: Mapping[str, Any], options: RunOptions) -> LoadedRecipe:
    """A recipe given as data, with the changes that ``--set`` asks for. Raises ``RecipeError``."""
    from mergekit_px.plan.method_catalog import method_catalog
    from mergekit_px.recipe.load import recipe_from_mapping

    return recipe_from_mapping(recipe, methods=method_catalog(), name="", overrides=options.overrides())


def merge(loaded: LoadedRecipe, options: RunOptions, *, cluster: str | None = None, workers: Sequence[int] = ()) -> int:
    """Plan a recipe, carry it out, and publish it if that is asked for; with ``--dry-run`` only show the plan."""
    from mergekit_px.plan.build import build_plan

    output = output_for(json=options.json, quiet=options.quiet)
    if options.dry_run:
        refuse_report(options, "a plan reads no weights")
    # What is only planned may be meant for another machine.
    with timed("plan"):
        plan = build_plan(loaded, replace(options.plan_options(), require_room=not options.dry_run))
    if options.dry_run:
        show_plan(plan, output, workers)
        _note_lock(plan, output)
        _note_output(plan, output)
        return 0
    if plan.store is not None and (options.report is not None or plan.loaded.recipe.output.push is not None):
        raise UsageError(
            "--report and --push are for an output on this machine", hint="leave them out, or give a folder"
        )
    if options.report is not None and plan.output is not None:
        check_page(options.report, plan.output, [source.reference for source in plan.inputs.values()])
    push = plan.loaded.recipe.output.push
    if push is not None:
        from mergekit_px.hub.publish import uploadable

        uploadable(push.repo)  # what would fail after the merge is refused before it
    for note in plan.notes:
        output.note(f"note: {note}")
    _note_lock(plan, output)
    if plan.options.mode == "resume" and plan.store is None and plan.output is not None and not plan.output.exists():
        output.note(f"note: no unfinished run is in {plan.output}, so --resume begins a new one")
    if cluster is not None:
        result = _run_on_cluster(plan, cluster, output)
    else:
        result = _run([plan], output)[0] if plan.store is None else _run_to_store(plan, output)
    address = None if push is None else _publish(push, result, output)
    if options.report is not None:
        report_run(plan, result, options.report, output)
    _report(result, plan, address, output)
    return 0


def refuse_report(options: RunOptions, why: str) -> None:
    """Raises ``UsageError`` where ``--report`` is given."""
    if options.report is not None:
        raise UsageError(f"--report tells of a finished merge, and {why}", hint="`pxmerge report` tells of it later")


def plan_together(merges: Sequence[tuple[Mapping[str, Any], RunOptions, Path]]) -> list[Plan]:
    """The plans of recipes, each with its options and its output, whose models of one name are the same."""
    from mergekit_px.plan.build import build_plan

    plans: list[Plan] = []
    inputs: dict[str, ResolvedInput] = {}
    for recipe, options, place in merges:
        plan_options = replace(options.plan_options(), output=place)
        plans.append(build_plan(load_mapping(recipe, options), plan_options, inputs))
        inputs.update(plans[-1].inputs)
    return plans


def run_together(plans: Sequence[Plan], output: Output) -> list[RunResult]:
    """Carry plans out in one pass, and tell what there is to tell of each once."""
    for note in dict.fromkeys(note for plan in plans for note in plan.notes):
        output.note(f"note: {note}")
    results = _run(plans, output)
    for warning in dict.fromkeys(warning for result in results for warning in result.warnings):
        output.warning(warning)
    return results


def merge_together(recipes: Mapping[str, Mapping[str, Any]], options: RunOptions) -> int:
    """Run recipes over the same models in one pass; each result is a folder of its own in the output folder.

    Raises ``UsageError`` for ``--push`` and ``--report``, which take one model.
    """
    from mergekit_px.plan.report import plan_report

    output = output_for(json=options.json, quiet=options.quiet)
    if options.push is not None:
        raise UsageError("--push takes one model, and several are written", hint="push them one by one")
    refuse_report(options, "several are written")
    home = options.output or Path("merged")
    merges = [(recipe, options, home / name) for name, recipe in recipes.items()]
    plans = dict(zip(recipes, plan_together(merges), strict=True))
    if options.dry_run:
        if options.json:
            output.document({"outputs": {name: plan_report(plan) for name, plan in plans.items()}}, PlansDocument)
            return 0
        for name, plan in plans.items():
            output.heading(name)
            show_plan(plan, output)
        return 0
    results = run_together(list(plans.values()), output)
    read, written = sum(each.bytes_read for each in results), sum(each.bytes_written for each in results)
    seconds = max(each.seconds for each in results)
    moved = f"{show_bytes(read)} read, {show_bytes(written)} written"
    output.note(f"{len(results)} models in {show_seconds(seconds)}: {moved}")
    for result in results:
        output.text(str(result.output))
    output.document(
        {
            "outputs": {name: _document(result, plans[name]) for name, result in zip(plans, results, strict=True)},
            "seconds": seconds,
            "bytes_read": read,
            "bytes_written": written,
            "peak_memory": max(each.peak_memory for each in results),
        },
        RunsDocument,
    )
    return 0


def _note_lock(plan: Plan, output: Output) -> None:
    """Say whether a merge of locked inputs is the one that was locked."""
    if plan.lock is not None and plan.lock.plan_hash != plan.hash:
        output.note("note: the inputs are those of the lock; the recipe or its options changed since it was made")


def _note_output(plan: Plan, output: Output) -> None:
    """Say what a run would find in the output folder."""
    from mergekit_px.checkpoint.destination import check_mode
    from mergekit_px.errors import DiskSpaceError, OutputError
    from mergekit_px.execute.finished import claims_result
    from mergekit_px.plan.build import check_room

    if plan.output is None or plan.store is not None:
        return
    try:
        check_mode(plan.output, plan.options.mode, plan.hash)
        if plan.options.mode == "new":
            check_room(plan, plan.output)
    except DiskSpaceError as error:
        output.note(f"note: a run here would be refused: {error}")
    except OutputError as error:
        if claims_result(plan):
            output.note(f"note: {plan.output} is the result of this plan already, if its inputs did not change since")
        else:
            output.note(f"note: a run would be refused: {error}")


def _run(plans: Sequence[Plan], output: Output) -> list[RunResult]:
    with timed("import"):
        from mergekit_px.execute.run import run_plans

    with progress_on(output) as advance:
        try:
            return run_plans(plans, progress=lambda state: advance(state.phase, state.bytes_done, state.bytes_total))
        except KeyboardInterrupt:
            raise Interrupted from None


def _run_to_store(plan: Plan, output: Output) -> RunResult:
    from mergekit_px.execute.store_output import run_to_store

    with progress_on(output) as advance:
        try:
            return run_to_store(plan, progress=lambda state: advance(state.phase, state.bytes_done, state.bytes_total))
        except KeyboardInterrupt:
            raise Interrupted from None


def _run_on_cluster(plan: Plan, cluster: str, output: Output) -> RunResult:
    from mergekit_px.execute.cluster import run_on_cluster

    with progress_on(output) as advance:
        try:
            return run_on_cluster(
                plan, cluster, progress=lambda state: advance(state.phase, state.bytes_done, state.bytes_total)
            )
        except KeyboardInterrupt:
            raise Interrupted from None


def _publish(push: Push, result: RunResult, output: Output) -> str:
    """The address of the upload; a failure names the command that goes on from the finished folder."""
    from mergekit_px.hub.publish import publish

    again = ["push", str(result.output), push.repo, *(["--private"] if push.private else [])]
    again += ["--revision", push.revision] if push.revision is not None else []
    try:
        with progress_on(output) as advance:
            return publish(
                result.output,
                push.repo,
                private=push.private,
                revision=push.revision,
                message="Merge with pxmerge",
                progress=partial(advance, "uploading"),
            )
    except HubError as error:
        later = f"the merge is complete; to upload it: {shlex.join([PROGRAM, *again])}"
        hint = f"{error.hint}; {later}" if error.hint else later
        raise HubError(error.what, where=error.where, hint=hint) from error
    except KeyboardInterrupt:
        raise Interrupted(again) from None


def _report(result: RunResult, plan: Plan, address: str | None, output: Output) -> None:
    for warning in result.warnings:
        output.warning(warning)
    if result.up_to_date:
        output.note(f"up to date: {result.output} is the result of this plan already")
    if not result.up_to_date:
        moved = f"{show_bytes(result.bytes_read)} read, {show_bytes(result.bytes_written)} written"
        speed = show_bytes((result.bytes_read + result.bytes_written) / result.seconds)
        output.note(f"{len(plan.items)} tensors in {show_seconds(result.seconds)}: {moved} ({speed}/s)")
    if result.peak_memory:
        output.note(f"peak memory {show_bytes(result.peak_memory)}")
    if address is not None:
        output.note(f"uploaded to {address}")
    output.text(plan.store or str(result.output))
    output.document(_document(result, plan) | {"pushed": address}, RunDocument)


def _document(result: RunResult, plan: Plan) -> dict[str, Any]:
    return {
        "output": plan.store or str(result.output),
        "files": dict(result.files),
        "tensors": len(plan.items),
        "seconds": result.seconds,
        "bytes_read": result.bytes_read,
        "bytes_written": result.bytes_written,
        "peak_memory": result.peak_memory,
        "up_to_date": result.up_to_date,
        "notes": list(result.notes),
        "warnings": list(result.warnings),
    }
