"""``pxmerge verify``: a merged model against its lock file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mergekit_px.cli._documents import VerifyDocument
from mergekit_px.cli._options import AllowPickle, Json, Quiet
from mergekit_px.cli._output import output_for
from mergekit_px.cli._progress import progress_on

MergeOutput = Annotated[Path, typer.Argument(metavar="PATH", help="The output of a merge: a folder or a file.")]
Rebuild = Annotated[
    bool, typer.Option("--rebuild", help="Merge again from recipe and lock file, and compare the bytes.")
]

DIFFERENT = 3
"""Exit code where a file is changed, missing, extra or another when merged again."""


def verify(
    directory: MergeOutput,
    rebuild: Rebuild = False,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Hash every file of a merged model and compare with its lock file.

    Files that are changed, missing or extra are listed, and the exit code is then 3.

    With --rebuild the recipe in the folder is run again with the inputs of the lock file, in a temporary
    folder, and what comes out is compared byte by byte. The model card, which is prose, is left out. Local inputs are
    sought under the paths of the recipe, relative to the current directory.

    \b
    Examples:
      pxmerge verify ./merged
      pxmerge verify ./merged --rebuild
    """
    from mergekit_px.inspection.verify import verify as check

    output = output_for(json=json, quiet=quiet)
    with progress_on(output) as advance:
        found = check(directory, partial(advance, "hashing"))
        again = None
        if rebuild:
            from mergekit_px.inspection.rebuild import rebuild as merge_again

            again = merge_again(
                directory,
                allow_pickle=allow_pickle,
                progress=lambda state: advance(state.phase, state.bytes_done, state.bytes_total),
            )
    different = () if again is None else again.different
    for note in () if again is None else again.notes:
        output.note(f"note: {note}")
    output.document(
        {
            "directory": str(directory),
            "intact": found.is_intact,
            "matching": list(found.matching),
            "changed": list(found.changed),
            "missing": list(found.missing),
            "extra": list(found.extra),
            "rebuilt": None
            if again is None
            else {"matching": list(again.matching), "different": list(different), "notes": list(again.notes)},
        },
        VerifyDocument,
    )
    states = {"changed": found.changed, "missing": found.missing, "extra": found.extra}
    for state, names in {**states, "different when merged again": different}.items():
        for name in names:
            output.text(f"{state}: {name}")
    if found.is_intact:
        count = len(found.matching)
        files = "1 file matches" if count == 1 else f"{count} files match"
        output.text(f"OK: {files} the lock")
    if again is not None and not different:
        count = len(again.matching)
        files = "1 file is" if count == 1 else f"{count} files are"
        output.text(f"OK: {files} the same when merged again")
    return 0 if found.is_intact and not different else DIFFERENT
