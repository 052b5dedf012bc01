"""``pxmerge report``: what a merge was, or what was learned, as one page."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_px.cli._options import AllowPickle, Json, Quiet
from mergekit_px.cli._output import output_for
from mergekit_px.cli._progress import progress_on
from mergekit_px.cli._report import check_page, write_page

if TYPE_CHECKING:
    from mergekit_px.inspection.merge_report import MergeReport
    from mergekit_px.learn.result import LearnedReport

Result = Annotated[
    Path, typer.Argument(metavar="PATH", help="The output of a merge, or of what learns: a folder or a file.")
]
Page = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="FILE", help="The page.  [default: PATH-report.html, beside the merge]"),
]


def report(
    directory: Result,
    page: Page = None,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Write what a merge was, or what was learned, as one HTML file, which needs no network and no server.

    Of a merge: what went in (commits, licences), what was decided (methods, rules and weights by groups of tensors),
    what changed (relative change, sign conflicts, energy kept, cosines and shares of the sources by layer and module),
    warnings. The merge's recipe and lock file tell how it was made; its inputs are read again, in pieces.

    Of the output of ofasd, align, tune, search and the like: scores, coefficients by layer, trials, traces of training.

    With --report FILE a command that merges writes the same, and how long it took.

    \b
    Examples:
      pxmerge report ./merged
      pxmerge report ./merged -o page.html --json > report.json
      pxmerge report ./coefficients
    """
    from mergekit_px.cli._report_page import learned_page, merge_page
    from mergekit_px.inspection.merge_report import report_on
    from mergekit_px.learn.result import learned_report

    output = output_for(json=json, quiet=quiet)
    path = directory.with_name(f"{directory.resolve().name}-report.html") if page is None else page
    check_page(path, directory)
    found: MergeReport | LearnedReport
    learned = learned_report(directory)
    if learned is not None:
        found = learned
        write_page(path, learned_page(learned))
    else:
        with progress_on(output) as advance:
            found = report_on(directory, allow_pickle=allow_pickle, progress=partial(advance, "measuring"))
        write_page(path, merge_page(found))
    for warning in found.warnings:
        output.warning(warning)
    output.document(found)
    output.text(str(path))
    return 0
