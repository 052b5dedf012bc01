"""What a pool remembers beside its vectors: whose components they are, and how they were chosen (``pool.json``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mergekit_px.errors import InputError, InputNotFoundError
from mergekit_px.small_files import read_small_file

RECORD_FILE = "pool.json"


class PartRecord(BaseModel):
    """One matrix: a tensor, or a block of its rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: list[int]
    """Source of each component, in the order of the components."""
    order: list[int]
    """Place of each among its source's components."""
    energies: list[float]
    """Squared Frobenius norm of each source's weighted delta."""


class TensorRecord(BaseModel):
    """The matrices of one tensor; none for a tensor whose deltas are averaged."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    parts: list[PartRecord] = []
    settings: dict[str, Any] | None = None
    """Where they are not those of the pool."""


class PoolRecord(BaseModel):
    """``pool.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = 1
    sources: list[str]
    base: str | None = None
    """The base as it was given."""
    base_fingerprint: str | None = None
    settings: dict[str, Any]
    """The parameters of the method."""
    tensors: dict[str, TensorRecord]

    def settings_of(self, name: str) -> Mapping[str, Any]:
        """The parameters that a tensor was merged with."""
        own = self.tensors[name].settings
        return self.settings if own is None else own

    def encoded(self) -> bytes:
        return (json.dumps(self.model_dump(exclude_none=True), separators=(",", ":")) + "\n").encode()


def read_record(folder: Path) -> PoolRecord:
    """The record of a pool.

    Raises:
        InputNotFoundError: no such folder.
        InputError: it holds no pool, or not one of this version.
    """
    if not folder.is_dir():
        raise InputNotFoundError(
            "no such folder of components", where=str(folder), hint="make one with --as components"
        )
    place = folder / RECORD_FILE
    try:
        record = PoolRecord.model_validate_json(read_small_file(place, folder=folder))
    except InputNotFoundError:
        raise InputError(
            f"there is no {RECORD_FILE}, so sources cannot be added",
            where=str(folder),
            hint="give a folder that `pxmerge svd --as components` wrote",
        ) from None
    except ValidationError as error:
        raise InputError(f"it is no record of a pool: {error.errors()[0]['msg']}", where=str(place)) from error
    if record.version != 1:
        raise InputError(f"version {record.version} of the format is not known", where=str(place))
    return record
