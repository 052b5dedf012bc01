"""``pxmerge lock``: pin every input of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_px.cli._arguments import Several
from mergekit_px.cli._documents import LockDocument
from mergekit_px.cli._options import AllowPickle, Json, Quiet, RecipeFile
from mergekit_px.cli._output import output_for
from mergekit_px.errors import OutputError, UsageError

if TYPE_CHECKING:
    from mergekit_px.plan.lock import Lock

LockFile = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="FILE", help="Where it is written.  [default: beside the recipe]"),
]
Upgrade = Annotated[
    list[str] | None,
    typer.Option("--upgrade", metavar="NAME...", help="Move only these inputs; the others stay as they are locked."),
    Several("--upgrade"),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE...", help="Set keys of the recipe."),
    Several("--set", "assignments"),
]


def lock(
    recipe: RecipeFile,
    output: LockFile = None,
    upgrade: Upgrade = None,
    assignments: Assignments = None,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Write down what every input of a recipe is now: Hub models by commit, every file by size and sha256.

    The file, pxmerge.lock.json beside the recipe, is for version control; `pxmerge run --locked` then merges exactly
    that, or says what moved. Nothing is downloaded but headers and small files; local files are hashed.

    A lock that is there is made anew, and what moved since is told. With --upgrade, only the named inputs may move.

    \b
    Examples:
      pxmerge lock recipe.yaml
      pxmerge lock recipe.yaml --upgrade math
      pxmerge run recipe.yaml --locked
    """
    from mergekit_px.checkpoint.destination import LOCK_FILE
    from mergekit_px.checkpoint.replacement import require_writable
    from mergekit_px.execute.locking import lock_recipe
    from mergekit_px.plan.method_catalog import method_catalog
    from mergekit_px.recipe.load import load_recipe

    sink = output_for(json=json, quiet=quiet)
    loaded = load_recipe(recipe, overrides=assignments or (), methods=method_catalog())
    named = Path(loaded.recipe.lock or LOCK_FILE).expanduser()
    path = output or Path(recipe).parent / named
    require_writable(path)
    before = _earlier(path, upgrade or ())
    made = lock_recipe(loaded, path, before, upgrade or (), allow_pickle=allow_pickle)
    moved = before.moved_to(made) if before is not None else []
    for sentence in moved:
        sink.note(sentence)
    if before is not None and not moved:
        sink.note("nothing moved since it was locked")
    sink.text(str(path))
    sink.document({"lock": str(path), "inputs": list(made.inputs), "moved": moved}, LockDocument)
    return 0


def _earlier(path: Path, upgrade: list[str] | tuple[str, ...]) -> Lock | None:
    """The lock that is to be replaced, if there is one. Anything else is left alone."""
    from mergekit_px.checkpoint.index import LARGEST_INDEX
    from mergekit_px.checkpoint.json_text import read_object
    from mergekit_px.errors import InputError
    from mergekit_px.located.nearest import hint_for
    from mergekit_px.plan.lock import parse_lock, read_lock

    if not path.exists():
        if upgrade:
            read_lock(path)  # which says that there is none
        return None
    hint = "name another file with -o"
    try:
        document = read_object(path, limit=LARGEST_INDEX)
        earlier = parse_lock(document, path)
    except InputError as error:
        raise OutputError("the file there is no lock, and is left alone", where=str(path), hint=hint) from error
    if document.get("files"):
        raise OutputError("that is the lock of a finished merge, and is left alone", where=str(path), hint=hint)
    for name in upgrade:
        if name not in earlier.inputs:
            raise UsageError(f"no input '{name}' is locked", where=str(path), hint=hint_for(name, earlier.inputs))
    return earlier
