"""``pxmerge acmap merge``: the running mean of the adapters of a sequence of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mergekit_px.cli._documents import RunningMergeDocument
from mergekit_px.cli._errors import Interrupted
from mergekit_px.cli._options import AllowPickle, Json, Quiet
from mergekit_px.cli._output import Column, Output, output_for
from mergekit_px.cli.adapter_inputs import Overwrite, require_new_file, require_new_folder
from mergekit_px.errors import UsageError

if TYPE_CHECKING:
    from mergekit_px.adapters.acmap import AcmapState
    from mergekit_px.checkpoint.contents import Checkpoint

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_MEANING = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
"""Fields of a configuration without which a mean of the factors means nothing."""

Adapters = Annotated[
    list[str], typer.Argument(metavar="ADAPTER...", help="One adapter for each task: files or PEFT folders.")
]
Result = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="PATH", help="The merged adapter: a .safetensors file, or a PEFT folder."),
]
StateFile = Annotated[
    Path | None, typer.Option("--state", metavar="FILE", help="What is needed to go on with later tasks; made if new.")
]
Mode = Annotated[
    Literal["average", "trim", "trim-published", "aper", "none"] | None,
    typer.Option("--mode", help="How the adapters are merged.  [default: average, or the state's]"),
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit", metavar="L", min=0, help="Stop after L adapters, 0 for never.  [default: 10, or the state's]"
    ),
]
TrimRate = Annotated[
    float | None,
    typer.Option("--trim-rate", metavar="X", help="Share of the entries that the trim modes drop.  [default: 0]"),
]
NoPast = Annotated[
    bool, typer.Option("--no-past", help="Do not keep the earlier merged adapters, which prototypes need.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Pass over the adapters that the state has already.")]


def merge(
    adapters: Adapters,
    output: Result = None,
    state: StateFile = None,
    mode: Mode = None,
    limit: Limit = None,
    trim_rate: TrimRate = None,
    no_past: NoPast = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Merge the adapters of a sequence of tasks as ACMap does: the running mean, frozen after L of them.

    Any adapters whose tensors have the same names and shapes will do, bottleneck adapters of a vision transformer
    as in the paper among them. The result of average and trim does not depend on their order. Modes: average; trim
    (the mean over the adapters in which an entry is among the largest); trim-published (as the authors' code does
    it); aper (the first adapter); none (the newest).

    With --state each task is kept as soon as it is merged: later tasks are added by a later command, and after an
    interruption the same command goes on with --resume.

    \b
    Examples:
      pxmerge acmap merge task1.safetensors task2.safetensors -o merged.safetensors
      pxmerge acmap merge task1.safetensors --state acmap.safetensors
      pxmerge acmap merge task2.safetensors --state acmap.safetensors -o merged.safetensors
    """
    if output is None and state is None:
        raise UsageError("nothing would be written", hint="give -o, --state, or both")
    if resume and state is None:
        raise UsageError("--resume goes with --state", hint="name the state file")
    sink = output_for(json=json, quiet=quiet, writes=True)
    if output is not None:
        _check_output(output, adapters[0], overwrite=overwrite or resume)
    checkpoints = [_open(adapter, allow_pickle) for adapter in adapters]
    with _held(state):
        current = _state(state, mode, limit, trim_rate, no_past)
        _check_configs(adapters, current, state)
        try:
            added = _merge(current, adapters, checkpoints, state, resume=resume)
        except KeyboardInterrupt:
            if state is None:
                raise
            raise Interrupted from None
    if added == 0:
        sink.note("every adapter is in the state already")
    if any((Path(adapter) / _CONFIG).is_file() for adapter in adapters):
        sink.note("note: this is the mean of the factors, as ACMap defines it; `pxmerge adapter merge` merges updates")
    if output is not None:
        _write(current, output, adapters[0])
    _show(current, sink)
    sink.document(
        {
            "output": None if output is None else str(output),
            "state": None if state is None else str(state),
            "mode": current.mode,
            "limit": current.limit,
            "trim_rate": current.trim_rate,
            "merged": current.count,
            "added": added,
            "tasks": [{"adapter": task.label, "merged": task.merged} for task in current.tasks],
        },
        RunningMergeDocument,
    )
    sink.text(str(output or state))
    return 0


def _held(state: Path | None) -> AbstractContextManager[None]:
    """The state file, held against other processes. Raises ``OutputLockedError``, ``WriteError``."""
    from mergekit_px.adapters.acmap_file import locked

    return nullcontext() if state is None else locked(state)


def _state(
    file: Path | None, mode: str | None, limit: int | None, trim_rate: float | None, no_past: bool
) -> AcmapState:
    """The state in the file, or a new one. Raises ``UsageError`` for settings other than those it was begun with."""
    from mergekit_px.adapters.acmap import DEFAULT_LIMIT, AcmapState

    wanted = {"mode": mode and mode.replace("-", "_"), "limit": limit, "trim_rate": trim_rate}
    if file is None or not file.exists():
        return AcmapState(
            mode=wanted["mode"] or "average",  # type: ignore[arg-type]
            limit=DEFAULT_LIMIT if limit is None else limit,
            trim_rate=trim_rate or 0.0,
            keep_past=not no_past,
        )
    found = AcmapState.load(file)
    for name, value in wanted.items():
        if value is not None and value != getattr(found, name):
            raise UsageError(
                f"--{name.replace('_', '-')} is {value}, but the state was begun with {getattr(found, name)}",
                where=str(file),
                hint="leave it out, or begin a new state",
            )
    return found


def _merge(
    current: AcmapState, adapters: Sequence[str], checkpoints: Sequence[Checkpoint], file: Path | None, *, resume: bool
) -> int:
    """Merge the adapters, saving after each; returns how many were new."""
    from mergekit_px.checkpoint.whole import read_tensors

    twice = [adapter for number, adapter in enumerate(adapters) if adapter in adapters[:number]]
    if twice:
        raise UsageError("the adapter is given twice", where=twice[0])
    known = {task.label for task in current.tasks}
    if (repeated := [adapter for adapter in adapters if adapter in known]) and not resume:
        raise UsageError("the state has this adapter already", where=repeated[0], hint="leave it out, or give --resume")
    added = 0
    for adapter, checkpoint in zip(adapters, checkpoints, strict=True):
        if adapter not in known:
            current.add(read_tensors(checkpoint), adapter)
            added += 1
            if file is not None:
                current.save(file)
    return added


def _open(adapter: str, allow_pickle: bool) -> Checkpoint:
    from mergekit_px.checkpoint.open import open_checkpoint

    folder = Path(adapter).expanduser()
    place = folder / _WEIGHTS if (folder / _WEIGHTS).is_file() else folder
    return open_checkpoint(place, label=adapter, allow_pickle=allow_pickle)


def _check_configs(adapters: Sequence[str], current: AcmapState, state: Path | None) -> None:
    """Raises ``TensorMismatchError`` where PEFT adapters differ in what their factors mean, ``AdapterError`` for a
    malformed configuration. The first one's is kept in a new state."""
    from mergekit_px.adapters.config import read_config
    from mergekit_px.errors import TensorMismatchError

    first = str(state) if current.config is not None else None
    for adapter in adapters:
        folder = Path(adapter).expanduser()
        if not (folder / _CONFIG).is_file():
            continue
        values = dict(read_config(folder, adapter).values)
        if current.config is None and current.count == 0:
            current.config = values
        if current.config is None:
            continue
        first = first or adapter
        for name in _MEANING:
            mine, others = values.get(name) or None, current.config.get(name) or None
            if mine != others:
                raise TensorMismatchError(
                    f"'{name}' is {mine}, in {first} {others}, so a mean of the factors is none",
                    where=adapter,
                    hint="`pxmerge adapter merge` merges the updates instead",
                )


def _check_output(output: Path, first: str, *, overwrite: bool) -> None:
    """Raises ``OutputError``, or ``UsageError`` where there is no configuration to put beside the weights."""
    if output.suffix == ".safetensors":
        require_new_file(output, overwrite=overwrite)
        return
    if not (Path(first).expanduser() / _CONFIG).is_file():
        raise UsageError("the adapters are no PEFT folders", where=str(output), hint="give a name with .safetensors")
    require_new_folder(output, overwrite=overwrite)


def _write(current: AcmapState, output: Path, first: str) -> None:
    """A file, or a folder with the first adapter's configuration. Raises ``WriteError``."""
    from mergekit_px.checkpoint.whole import write_tensors
    from mergekit_px.errors import WriteError
    from mergekit_px.small_files import read_small_file

    folder = output.parent if output.suffix == ".safetensors" else output
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folder is output:
            home = Path(first).expanduser()
            (folder / _CONFIG).write_bytes(read_small_file(home / _CONFIG, folder=home))
    except OSError as error:
        raise WriteError(f"cannot be written: {error.strerror}", where=str(folder)) from error
    write_tensors(folder / _WEIGHTS if folder is output else output, current.merged(), {"format": "pt"})


def _show(current: AcmapState, sink: Output) -> None:
    sink.table(
        [Column("task", "right"), Column("adapter"), Column("")],
        [
            (number, task.label, None if task.merged else "after the stop")
            for number, task in enumerate(current.tasks, 1)
        ],
    )
