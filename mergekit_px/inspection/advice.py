"""What to try first with some models: from what they are to one another, and what was measured on their like.

Advice is a table look-up, not a model: the sources are measured, the suite of docs/quality.md whose fine-tunes are
nearest is found, and its scores are the order of the methods. What no suite has is said.
"""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from mergekit_px.declare.document import Document
from mergekit_px.errors import InputError, PlanError, UsageError
from mergekit_px.inspection.evidence import CAVEAT, ERROR, METHODS, PAGE, SUITES, Suite, nearest_suite
from mergekit_px.inspection.relations import Relations, relations
from mergekit_px.methods.declare import method_slug
from mergekit_px.plan.build import build_plan
from mergekit_px.plan.method_catalog import method_catalog
from mergekit_px.plan.model import Plan
from mergekit_px.plan.options import PlanOptions
from mergekit_px.recipe.dump import dump_recipe
from mergekit_px.recipe.load import recipe_from_mapping
from mergekit_px.recipe.naming import model_names

_ALIKE = 0.95
"""Cosine of two changes from which one source adds next to nothing to the other."""
_STRANGERS = 0.5
"""Cosine of matrices far below that of any fine-tunes of one base that were measured; of unrelated ones it is 0."""

Progress = Callable[[str, int, int], None]


class Statement(Document):
    """Something that follows from a measurement."""

    text: str
    measured: dict[str, float | int | str | None] = Field(description="The numbers that it rests on, by name.")
    evidence: str | None = Field(default=None, description="Where the numbers that it is held against are from.")


class Candidate(Document):
    """A method that can merge these models."""

    method: str
    params: dict[str, Any]
    scale: float = Field(description="Factor of the whole update at which the score was measured.")
    score: float = Field(description="Percent of the fine-tunes' accuracy that it kept in the nearest suite.")
    level: bool = Field(description="Whether the difference to the best is within the error of the measurement.")
    options: str = Field(description="How it is asked for on the command line.")


class Advice(Document):
    """What ``pxmerge advise --json`` prints."""

    relations: Relations
    suite: str = Field(description="The experiment of docs/quality.md whose fine-tunes are most like these.")
    pretrained: float = Field(description="What its base alone kept, in percent.")
    statements: list[Statement]
    methods: list[Candidate] = Field(description="Those that the suite has and that these models allow, best first.")
    notes: list[str] = Field(description="What the plan of the recipe assumes.")
    recipe: str = Field(description="A recipe to begin with, which plans.")


def advise(models: Mapping[str, str], base: str | None, *, options: PlanOptions, progress: Progress) -> Advice:
    """Measure models and say what to try first.

    Args:
        models: references by the names that the recipe gives them.
        base: the model that they were fine-tuned from, if it is known.
        options: of the plan, such as whether pickle files are read; its output is not used.
        progress: called with a phase, bytes done and bytes in all.

    Raises:
        UsageError: fewer than two models.
        InputError: a model is missing or unreadable, or nothing is left to merge.
        PlanError: the models cannot be merged.
    """
    from mergekit_px.execute.run import fetch_inputs

    if len(models) < 2:
        raise UsageError("one model alone cannot be merged", hint="give two models or more, and their --base")
    probe: dict[str, Any] = {"method": "linear" if base is None else "task_arithmetic", "params": {}}
    plan, tokens = _planned(models, base, probe, options)
    plan = fetch_inputs(plan, lambda state: progress(state.phase, state.bytes_done, state.bytes_total))
    found = relations(plan, progress=lambda done, total: progress("comparing", done, total))
    statements = [*tokens, *_duplicates(found)]
    kept = {name: models[name] for name in models if name not in _superfluous(found)}
    if len(kept) < 2:
        raise InputError(
            f"nothing is left to merge: {'; '.join(statement.text for statement in statements)}",
            where=", ".join(models.values()),
        )
    suite = nearest_suite(len(kept), found.relative)
    statements += _held_against(found, suite, len(kept))
    methods = _candidates(suite, with_base=found.of_changes)
    best = methods[0]
    chosen = {"method": best.method, "params": best.params}
    plan, _ = _planned(kept, base, chosen, options)
    return Advice(
        relations=found,
        suite=suite.experiment,
        pretrained=suite.pretrained,
        statements=statements,
        methods=methods,
        notes=list(plan.notes),
        recipe=_comments(best, suite, statements) + dump_recipe(plan.loaded.recipe),
    )


def _planned(
    models: Mapping[str, str], base: str | None, chosen: Mapping[str, Any], options: PlanOptions
) -> tuple[Plan, list[Statement]]:
    """The plan of one step; with a common vocabulary, and a statement, where only tokens stand in the way."""
    recipe = _recipe(models, base, chosen)
    try:
        return _plan(recipe, options), []
    except PlanError as error:
        try:
            plan = _plan({**recipe, "tokenizer": {"from": "union"}}, options)
        except PlanError:
            raise error from None
        return plan, [
            Statement(
                text=f"the tokenizers differ, so the recipe makes one vocabulary of all tokens: {error}",
                measured={"refusal": str(error)},
            )
        ]


def _plan(recipe: Mapping[str, Any], options: PlanOptions) -> Plan:
    loaded = recipe_from_mapping(recipe, methods=method_catalog())
    with tempfile.TemporaryDirectory() as folder:  # whether the output's place is free is not the question here
        return build_plan(loaded, replace(options, output=Path(folder) / "merged", require_room=False))


def _recipe(models: Mapping[str, str], base: str | None, chosen: Mapping[str, Any]) -> dict[str, Any]:
    step = {**chosen, "sources": list(models)}
    if base is None:
        return {"pxmerge": 1, "models": dict(models), "merge": step}
    (name,) = model_names([base], taken=list(models))
    return {"pxmerge": 1, "models": {name: base, **models}, "merge": {**step, "base": name}}


def _superfluous(found: Relations) -> set[str]:
    """Sources that are the base, or the same as one before them."""
    return {name for name, _, _ in _copies(found)}


def _copies(found: Relations) -> Iterator[tuple[str, str, float | None]]:
    """Sources that add nothing, what they are the same as, and how far from the reference they are."""
    known: dict[int, str] = {}
    for place, source in enumerate(found.sources):
        if found.of_changes and source.norm == 0:
            yield source.name, "the base", source.norm
            continue
        same = next((name for number, name in known.items() if found.same(number, place)), None)
        if same is None:
            known[place] = source.name
        else:
            yield source.name, f"'{same}'", source.norm


def _duplicates(found: Relations) -> list[Statement]:
    return [
        Statement(text=f"'{name}' has the weights of {other} and is left out", measured={"norm of change": norm})
        for name, other, norm in _copies(found)
    ]


def _held_against(found: Relations, suite: Suite, count: int) -> Iterator[Statement]:
    """What the numbers say beside those of the suites."""
    evidence = f"{PAGE}, `{suite.experiment}`"
    cosines = [source.matrix_cosine for source in found.sources if source.matrix_cosine is not None]
    if cosines and min(cosines) < _STRANGERS:
        least = min(one.weights_cosine for one in SUITES)
        yield Statement(
            text=f"these do not look like fine-tunes of one model: matrices have a cosine of {min(cosines):.2f} with "
            f"those of {found.base or found.sources[0].reference}, and the weights of all that were measured "
            f"{least:.2f} or more; nothing here backs a merge",
            measured={"least cosine of matrices": min(cosines)},
            evidence=PAGE,
        )
    if not found.of_changes:
        yield Statement(
            text="no base is given, so only averages can be advised: methods on task vectors need the model that all "
            "were fine-tuned from (--base)",
            measured={"sources": count},
        )
    else:
        moved = "" if found.relative is None else f"the sources changed {_percent(found.relative)} of the base's norm; "
        yield Statement(
            text=f"{moved}the nearest that were measured are {suite.sources} fine-tunes that changed "
            f"{_percent(suite.relative)}",
            measured={"sources": count, "relative change": found.relative},
            evidence=evidence,
        )
        yield from _beyond(found, count)
        yield from _between(found, suite, evidence)
    yield Statement(text=CAVEAT, measured={}, evidence=PAGE)


def _beyond(found: Relations, count: int) -> Iterator[Statement]:
    """Where these models lie outside of everything that was measured."""
    changes, counts = [suite.relative for suite in SUITES], [suite.sources for suite in SUITES]
    outside = []
    if found.relative is not None and not min(changes) / 2 <= found.relative <= 2 * max(changes):
        outside.append(
            f"a change of {_percent(found.relative)} lies outside of {_percent(min(changes))} to "
            f"{_percent(max(changes))}, which is what was measured"
        )
    if count > 2 * max(counts):
        outside.append(f"{count} sources are far more than {max(counts)}")
    if outside:
        yield Statement(
            text=f"{'; '.join(outside)}: take the order of the methods as a guess",
            measured={"sources": count, "relative change": found.relative},
            evidence=PAGE,
        )


def _between(found: Relations, suite: Suite, evidence: str) -> Iterator[Statement]:
    """How the changes lie to one another."""
    pairs = [
        (found.cosines[i][j] or 0.0, found.sources[j].name, found.sources[i].name)
        for i in range(len(found.sources))
        for j in range(i)
    ]
    cosine, first, second = max(pairs)
    if cosine > _ALIKE:
        yield Statement(
            text=f"'{first}' and '{second}' changed nearly the same (cosine {cosine:.3f}); in the suite changes have "
            f"{suite.cosine:.2f}: the second adds little, or a model nearer to both is the better base",
            measured={"largest cosine of changes": cosine},
            evidence=evidence,
        )
    unrelated = 1 - 2.0 ** (1 - len(found.sources))
    yield Statement(
        text=f"changes have a mean cosine of {found.cosine or 0:.2f} (the suite: {suite.cosine:.2f}), and differ in "
        f"sign in {_percent(found.sign_conflicts)} of the elements (unrelated ones: {_percent(unrelated)})",
        measured={"mean cosine of changes": found.cosine, "sign conflicts": found.sign_conflicts},
        evidence=evidence,
    )
    if found.rank_share is not None and found.alignment is not None:
        yield Statement(
            text=f"changes fill {_percent(found.rank_share)} of the rank (the suite: {_percent(suite.rank_share)}); "
            f"{_percent(found.alignment)} of one lies in the leading subspace of another (the suite: "
            f"{_percent(suite.alignment)}); over {found.matrices} matrices",
            measured={
                "effective rank, share": found.rank_share,
                "alignment": found.alignment,
                "matrices": found.matrices,
            },
            evidence=evidence,
        )
    else:
        yield Statement(
            text="no matrix was decomposed: all are too large for a quick look, or there are none; "
            "pxmerge compare --spectral decomposes every one",
            measured={"matrices": found.matrices},
        )


def _candidates(suite: Suite, *, with_base: bool) -> list[Candidate]:
    """The suite's methods that can be used, best first."""
    best = max(score for title, score in suite.scores.items() if with_base or METHODS[title].base_free)
    found = []
    for title, score in sorted(suite.scores.items(), key=lambda entry: -entry[1]):
        method = METHODS[title]
        if not with_base and not method.base_free:
            continue
        flags = [f"--{name.replace('_', '-')} {value}" for name, value in method.params.items()]
        found.append(
            Candidate(
                method=method.name,
                params=dict(method.params),
                scale=1.0,
                score=score,
                level=best - score <= ERROR,
                options=" ".join([method_slug(method.name), *flags]),
            )
        )
    return found


def _comments(best: Candidate, suite: Suite, statements: Sequence[Statement]) -> str:
    """The reasons, at the top of the recipe."""
    lines = [
        f"{best.options}: {best.score:g} percent of the fine-tunes' accuracy in `{suite.experiment}` of {PAGE}, where "
        f"the base alone has {suite.pretrained:g}.",
        *(statement.text for statement in statements),
    ]
    wrapped = (textwrap.wrap(line, 106, initial_indent="# - ", subsequent_indent="#   ") for line in lines)
    return "".join(f"{line}\n" for lines in wrapped for line in lines)


def _percent(share: float | None) -> str:
    return "an unknown share" if share is None else f"{100 * share:.3g} %"
