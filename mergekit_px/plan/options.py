"""How a run is to be done, apart from what the recipe asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mergekit_px.plan.lock import Lock


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Options of ``pxmerge run`` that the plan must know; each overrides the recipe where both speak."""

    output: Path | None = None
    dtype: str | None = None
    shard_size: str | int | None = None
    device: str = "auto"
    memory: int | None = None
    """Peak memory of the process in bytes; None for no limit but what the machine has."""
    threads: int | None = None
    mode: Literal["new", "resume", "overwrite"] = "new"
    allow_nonfinite: bool = False
    allow_pickle: bool = False
    allow_base_mismatch: bool = False
    strict: bool = False
    """Whether sources whose configs disagree in what the weights mean are refused."""
    require_room: bool = True
    """Whether an output that does not fit on the disk is refused while planning; the writer looks in any case."""
    hash_inputs: bool = True
    """Whether the lock file gets the sha256 of every local input file."""
    lock: Lock | None = None
    """What pins the inputs, in place of the lock that the recipe names."""
