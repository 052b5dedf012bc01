"""``pxmerge verify``: a merged model against its lock file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mergekit_px.cli._options import Json, Quiet
from mergekit_px.cli._output import output_for
from mergekit_px.cli._progress import progress_on

MergeOutput = Annotated[Path, typer.Argument(metavar="PATH", help="The output of a merge: a folder or a file.")]

DIFFERENT = 3
"""Exit code where a file is changed, missing or extra."""


def verify(directory: MergeOutput, json: Json = False, quiet: Quiet = False) -> int:
    """Hash every file of a merged model and compare with its lock file.

    Files that are changed, missing or extra are listed, and the exit code is then 3.

    \b
    Example:
      pxmerge verify ./merged
    """
    from mergekit_px.inspection.verify import verify as check

    output = output_for(json=json, quiet=quiet)
    with progress_on(output) as advance:
        found = check(directory, partial(advance, "hashing"))
    output.document(
        {
            "directory": str(directory),
            "intact": found.is_intact,
            "matching": list(found.matching),
            "changed": list(found.changed),
            "missing": list(found.missing),
            "extra": list(found.extra),
        }
    )
    for state, names in (("changed", found.changed), ("missing", found.missing), ("extra", found.extra)):
        for name in names:
            output.text(f"{state}: {name}")
    if found.is_intact:
        count = len(found.matching)
        files = "1 file matches" if count == 1 else f"{count} files match"
        output.text(f"OK: {files} the lock")
    return 0 if found.is_intact else DIFFERENT
