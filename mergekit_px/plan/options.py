"""How a run is to be done, apart from what the recipe asks for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mergekit_px.errors import UsageError
from mergekit_px.python_values import check_kind

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

    def __post_init__(self) -> None:
        check_kind("output", self.output, Path, "a path")
        check_kind("dtype", self.dtype, str, "the name of a dtype, as 'bfloat16'")
        check_kind("shard_size", self.shard_size, (str, int), "a size, as '5GB'")
        check_kind("device", self.device, str, "auto, cpu, cuda or cuda:1")
        for name in ("memory", "threads"):
            check_kind(name, getattr(self, name), int, "a whole number")
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        for field in fields(self):
            if isinstance(field.default, bool):
                check_kind(field.name, getattr(self, field.name), bool, "True or False")
