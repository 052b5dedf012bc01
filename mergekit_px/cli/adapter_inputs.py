"""What the commands on adapters share: adapters and base models from references as typed, options and their words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mergekit_px.cli._arguments import is_numbers
from mergekit_px.cli._output import Output
from mergekit_px.cli._progress import progress_on
from mergekit_px.errors import AdapterError, UsageError

if TYPE_CHECKING:
    from mergekit_px.adapters.binder import BindOptions
    from mergekit_px.adapters.save import Format
    from mergekit_px.checkpoint.contents import Checkpoint

WHAT = "a PEFT folder, a kohya, LyCORIS or diffusers file, or org/name"

AdapterPath = Annotated[str, typer.Argument(metavar="ADAPTER", help=f"An adapter: {WHAT}.")]
AdapterPaths = Annotated[list[str], typer.Argument(metavar="ADAPTER...", help=f"Adapters: each {WHAT}.")]
BaseModel = Annotated[str, typer.Argument(metavar="BASE", help="The base model: folder, file or org/name@revision.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


@dataclass(frozen=True, slots=True)
class AdapterOptions:
    """What the files of an adapter leave open, on the command line. The fields are those of a recipe's model."""

    component: Annotated[
        str | None,
        typer.Option(
            "--component",
            metavar="NAME",
            help="Of an adapter for a whole pipeline, the part that BASE is: unet, text_encoder, ...",
        ),
    ] = None
    keep_tied: Annotated[
        bool, typer.Option("--keep-tied", help="Keep a tied embedding and head alike, though one of them was trained.")
    ] = False
    attention_output: Annotated[
        Literal["as-trained", "once"],
        typer.Option(
            "--attention-output", help="How out_proj of nn.MultiheadAttention is added: as PEFT trains it, twice."
        ),
    ] = "as-trained"
    residual_base: Annotated[
        bool, typer.Option("--residual-base", help="BASE is the residual that a start such as PiSSA's left behind.")
    ] = False

    def chosen(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as a recipe says them."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        words = {
            name: value.replace("-", "_") if name == "attention_output" else value for name, value in given.items()
        }
        return {field.name: words[field.name] for field in fields(self) if given[field.name] != field.default}

    def bind_options(self) -> BindOptions:
        from mergekit_px.adapters.binder import BindOptions

        return BindOptions(**self.chosen())


def find_model(reference: str, output: Output, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a model with its bytes on this machine, telling how far it is fetched. Raises ``InputError``; AdapterError
    for an adapter."""
    from mergekit_px.adapters.single_file import is_adapter_file
    from mergekit_px.plan.inputs import fetch_checkpoint, is_adapter

    with progress_on(output) as advance:
        progress = partial(advance, f"fetching {reference}")
        found = fetch_checkpoint(reference, allow_pickle=allow_pickle, progress=progress)
    if is_adapter_file(found.tensors) or is_adapter(reference, allow_pickle):
        raise AdapterError("it is an adapter, and a model is wanted here", where=reference, hint="give its base model")
    return found


def check_format(to: Format, output: Path) -> Format:
    """The format, which must fit the name of what is written. Raises ``UsageError``."""
    if to == "peft" and output.suffix == ".safetensors":
        raise UsageError("a PEFT adapter is a folder", where=str(output), hint="give a name without .safetensors")
    if to != "peft" and output.suffix != ".safetensors":
        raise UsageError(f"{to} is a single file", where=str(output), hint="give a name that ends with .safetensors")
    return to


def require_new_folder(folder: Path, *, overwrite: bool, inputs: Sequence[str] = ()) -> None:
    """Refuse before the work what would fail after it, and an output that is an input. Raises ``OutputError``."""
    from mergekit_px.checkpoint.destination import check_mode

    _require_apart(folder, inputs)
    check_mode(folder, "overwrite" if overwrite else "new", "")


def require_new_file(file: Path, *, overwrite: bool, inputs: Sequence[str] = ()) -> None:
    """Refuse before the work what would fail after it, and an output that is an input. Raises ``OutputError``."""
    from mergekit_px.errors import OutputError

    _require_apart(file, inputs)
    if file.is_dir():
        raise OutputError("is a folder, and a file is to be written", where=str(file), hint="give another name")
    if file.exists() and not overwrite:
        raise OutputError("there is such a file already", where=str(file), hint="give another, or --overwrite")


def _require_apart(output: Path, inputs: Sequence[str]) -> None:
    from mergekit_px.checkpoint.destination import check_apart

    paths = [Path(reference).expanduser() for reference in inputs]
    check_apart(output, [path for path in paths if path.exists()])


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
