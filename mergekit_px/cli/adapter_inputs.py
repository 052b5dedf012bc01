"""What the commands on adapters share: adapters and base models from references as typed, options and their words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_px.cli._arguments import is_numbers
from mergekit_px.cli._output import Output
from mergekit_px.cli._progress import progress_on
from mergekit_px.errors import UsageError

if TYPE_CHECKING:
    from mergekit_px.adapters.adapter import Adapter
    from mergekit_px.checkpoint.contents import Checkpoint

WHAT = "a PEFT folder, a kohya, LyCORIS or diffusers file, or org/name"

AdapterPath = Annotated[str, typer.Argument(metavar="ADAPTER", help=f"An adapter: {WHAT}.")]
AdapterPaths = Annotated[list[str], typer.Argument(metavar="ADAPTER...", help=f"Adapters: each {WHAT}.")]
BaseModel = Annotated[str, typer.Argument(metavar="BASE", help="The base model: folder, file or org/name@revision.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


def find_adapter(reference: str, *, allow_pickle: bool = False) -> Adapter:
    """Open an adapter on this machine, or fetch it from the Hub.

    Raises:
        InputError: missing, unreachable or malformed; AdapterError among them.
    """
    from mergekit_px.adapters.open import open_adapter
    from mergekit_px.hub.reference import parse_reference

    hub_reference = parse_reference(reference)
    if hub_reference is None:
        return open_adapter(reference, allow_pickle=allow_pickle)
    from mergekit_px.hub.fetch import fetch
    from mergekit_px.hub.resolve import resolve

    return open_adapter(fetch(resolve(hub_reference)), label=reference, allow_pickle=allow_pickle)


def find_model(reference: str, output: Output, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a model with its bytes on this machine. Raises ``InputError``."""
    from mergekit_px.inspection.source import fetch_source, open_source

    source = open_source(reference, allow_pickle=allow_pickle)
    with progress_on(output) as advance:
        fetched = fetch_source(source, lambda done, total: advance(f"fetching {reference}", done, total))
    return fetched.checkpoint


def require_new_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse before the work what would fail after it. Raises ``OutputError``."""
    from mergekit_px.errors import OutputError

    if folder.exists() and not folder.is_dir():
        raise OutputError("is a file, and a folder is to be written", where=str(folder), hint="give another name")
    if folder.is_dir() and not overwrite and any(folder.iterdir()):
        raise OutputError("the folder is not empty", where=str(folder), hint="give another, or --overwrite")


def require_new_file(file: Path, *, overwrite: bool) -> None:
    """Refuse before the work what would fail after it. Raises ``OutputError``."""
    from mergekit_px.errors import OutputError

    if file.is_dir():
        raise OutputError("is a folder, and a file is to be written", where=str(file), hint="give another name")
    if file.exists() and not overwrite:
        raise OutputError("there is such a file already", where=str(file), hint="give another, or --overwrite")


def plain_numbers(words: Sequence[str] | None, count: int, of: str) -> list[float] | None:
    """The values of ``--weights``, one for each of ``count``. Raises ``UsageError``."""
    if words is None:
        return None
    for word in words:
        if not is_numbers(word) or "," in word:
            raise UsageError(f"--weights: '{word}' is not a number")
    if len(words) != count:
        raise UsageError(f"--weights has {len(words)} values for {count} {of}")
    return [float(word) for word in words]


def factor_dtype(name: str) -> str:
    """A storage type that factors can have. Raises ``UsageError``."""
    from mergekit_px.checkpoint.dtypes import parse_dtype

    found = parse_dtype(name)
    if found.name not in ("F64", "F32", "BF16", "F16"):
        raise UsageError(f"--dtype: factors cannot be {name}", hint="give float32, bfloat16, float16 or float64")
    return name
