"""``pxmerge pull``: download a model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mergekit_px.cli._options import AllowPickle, Json, Quiet
from mergekit_px.cli._output import output_for
from mergekit_px.cli._progress import progress_on

Repository = Annotated[str, typer.Argument(metavar="REPO", help="org/name or org/name@revision.")]
LocalFolder = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="DIR", help="A new folder for it; the Hub's cache if left out."),
]


def pull(
    repository: Repository,
    output: LocalFolder = None,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Download a model, pinned to the commit that its revision means now, and print the folder.

    Weights, config and side files are fetched, and lock and recipe of a merge, so that `pxmerge verify` can check it;
    what the cache holds is not fetched again.

    \b
    Examples:
      pxmerge pull org/name
      pxmerge pull org/name@v1.0 -o ./model
    """
    from mergekit_px.hub.fetch import pull as fetch

    sink = output_for(json=json, quiet=quiet)
    with progress_on(sink) as advance:
        folder = fetch(
            repository,
            local_dir=output,
            allow_pickle=allow_pickle,
            progress=partial(advance, "downloading"),
        )
    sink.document({"output": str(folder)})
    sink.text(str(folder))
    return 0
