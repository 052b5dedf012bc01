"""``pxmerge publish``: the parts of a job array as one output."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergekit_px.cli._documents import PublishDocument
from mergekit_px.cli._options import Json, Quiet
from mergekit_px.cli._output import output_for

ArrayOutput = Annotated[Path, typer.Argument(metavar="DIR", help="The output folder of the parts.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an older output that is in the folder.")]


def publish(directory: ArrayOutput, overwrite: Overwrite = False, json: Json = False, quiet: Quiet = False) -> int:
    """Put the parts that `pxmerge run --part` wrote in place, once all are finished.

    The files are only renamed. The result has the same bytes as that of a run in one piece; while parts are missing
    it is refused, naming them.

    \b
    Example:
      pxmerge publish ./merged
    """
    from mergekit_px.execute.array import publish_parts

    output = output_for(json=json, quiet=quiet)
    files = publish_parts(directory, overwrite=overwrite)
    output.text(str(directory))
    output.document({"output": str(directory), "files": files}, PublishDocument)
    return 0
