"""What a run tells while it goes on, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mergekit_px.escaping import html_table


@dataclass(frozen=True, slots=True)
class Progress:
    """State of a run; bytes are those of the output."""

    phase: str
    bytes_done: int
    bytes_total: int
    tensors_done: int
    tensors_total: int
    tensor: str


Report = Callable[[Progress], None]


@dataclass(frozen=True, repr=False)
class RunResult:
    """A finished run.

    Attributes:
        files: published file -> sha256.
        seconds: from the first read to the last rename.
        peak_memory: of the process, in bytes.
        notes: what the plan has to say.
        up_to_date: nothing was done, since the output was the result already.
        warnings: what the methods warned about, one line for each kind however many tensors are affected.
    """

    output: Path
    files: Mapping[str, str]
    seconds: float
    bytes_read: int
    bytes_written: int
    peak_memory: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    up_to_date: bool = False

    def __repr__(self) -> str:
        done = "up to date" if self.up_to_date else f"{self.bytes_written:,} bytes in {self.seconds:.3g} s"
        return f"<RunResult {self.output}: {done}>"

    def _repr_html_(self) -> str:
        rows = [
            ("output", str(self.output)),
            ("files", ", ".join(self.files)),
            ("bytes", f"{self.bytes_read:,} read, {self.bytes_written:,} written"),
            ("time", "up to date" if self.up_to_date else f"{self.seconds:.3g} s"),
            ("peak memory", f"{self.peak_memory:,} bytes"),
            *(("note", note) for note in self.notes),
            *(("warning", warning) for warning in self.warnings),
        ]
        return html_table(rows)
