"""``pxmerge push``: upload a model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mergekit_px.cli._options import Json, Quiet
from mergekit_px.cli._output import output_for
from mergekit_px.cli._progress import progress_on

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A finished folder.")]
Repository = Annotated[str, typer.Argument(metavar="REPO", help="org/name, made if it does not exist.")]
Private = Annotated[bool, typer.Option("--private", help="Make the repository private.")]
Revision = Annotated[str | None, typer.Option("--revision", metavar="NAME", help="The branch to push to.")]
Message = Annotated[str, typer.Option("--message", metavar="TEXT", help="Of the commit.")]


def push(
    directory: Folder,
    repository: Repository,
    private: Private = False,
    revision: Revision = None,
    message: Message = "Upload with pxmerge",
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Upload a folder to the Hub in one commit and print its address.

    The weights are sent first and become visible with everything else in that commit, or not at all.

    \b
    Examples:
      pxmerge push ./merged org/merged
      pxmerge push ./merged org/merged --private --revision ties
    """
    from mergekit_px.hub.publish import publish

    sink = output_for(json=json, quiet=quiet)
    with progress_on(sink) as advance:
        address = publish(
            directory,
            repository,
            private=private,
            revision=revision,
            message=message,
            progress=partial(advance, "uploading"),
        )
    sink.document({"address": address})
    sink.text(address)
    return 0
