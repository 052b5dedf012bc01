"""A state of ACMap on disk, read one merged adapter at a time."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_px.adapters import acmap_file
from mergekit_px.adapters.acmap import AcmapState
from mergekit_px.checkpoint.fingerprint import fingerprint
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.checkpoint.whole import read_tensor, read_tensors
from mergekit_px.errors import InputError, MalformedCheckpointError

if TYPE_CHECKING:
    import torch


class StoredState:
    """The settings of a state file, and its tensors on request.

    Raises:
        InputNotFoundError, MalformedCheckpointError: no state there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.where = str(path)
        self.checkpoint = open_checkpoint(path)
        self.state = AcmapState.of_settings(acmap_file.read_settings(self.checkpoint, self.where), self.where)

    @property
    def last(self) -> int:
        """The task after which the merged adapter stays as it is: L; 0 where there is no stop."""
        return self.state.limit

    def number(self, task: int) -> int:
        """The merged adapter of a task: the number of adapters in it.

        Raises InputError for a task whose adapter has not been merged.
        """
        number = min(task, self.last) if self.last else task
        if number > self.state.count:
            raise InputError(
                f"task {task} needs the merged adapter of {number} tasks, and {self.state.count} have been merged",
                where=self.where,
                hint="`pxmerge acmap merge` adds the next adapter",
            )
        return number

    def adapter(self, number: int) -> dict[str, torch.Tensor]:
        """The merged adapter of the first ``number`` tasks, in the dtypes of the first adapter.

        Raises InputError where the state was begun without keeping the earlier ones.
        """
        prefix = acmap_file.key(acmap_file.past_group(number), "")
        kept = [name for name in self.checkpoint.tensors if name.startswith(prefix)]
        if kept:
            return {name.removeprefix(prefix): one for name, one in read_tensors(self.checkpoint, kept).items()}
        if number != self.state.count:
            raise InputError(
                f"the merged adapter of {number} of the {self.state.count} tasks is not in the state",
                where=self.where,
                hint="it was begun with --no-past; merge again without it, or give the features under that adapter",
            )
        return self._newest()

    def fingerprint(self, number: int) -> str:
        """A short name for the merged adapters of 1 to ``number`` tasks, of as many as the state has."""
        groups = {acmap_file.past_group(one) for one in range(1, number + 1)} | {"first"}
        chosen = {
            name: stored
            for name, stored in self.checkpoint.tensors.items()
            if name.partition(":")[0] in groups and stored.nbytes
        }
        with closing(open_reader(self.checkpoint)) as reader:
            return fingerprint(replace(self.checkpoint, tensors=chosen), reader)

    def prototypes(self) -> dict[str, torch.Tensor]:
        """The tensors of the table of prototypes; none before the first mapping."""
        prefix = acmap_file.key(acmap_file.PROTOTYPES, "")
        kept = [name for name in self.checkpoint.tensors if name.startswith(prefix)]
        return {name.removeprefix(prefix): one for name, one in read_tensors(self.checkpoint, kept).items()}

    def with_prototypes(self, tensors: Mapping[str, torch.Tensor], mapping: dict[str, Any]) -> StoredState:
        """Write another table of prototypes into the file, the rest as it is; returns the state as it now is.

        Raises WriteError.
        """
        prefix = acmap_file.key(acmap_file.PROTOTYPES, "")
        others = {name: one for name, one in self.checkpoint.tensors.items() if not name.startswith(prefix)}
        named = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
        settings = replace(self.state, mapping=mapping).settings()
        acmap_file.write_state(self.path, named, settings, replace(self.checkpoint, tensors=others))
        return StoredState(self.path)

    def _newest(self) -> dict[str, torch.Tensor]:
        """The merged adapter from the sums, a tensor at a time."""
        groups: dict[str, dict[str, Any]] = {}
        for name, stored in self.checkpoint.tensors.items():
            group, _, rest = name.partition(":")
            groups.setdefault(group, {})[rest] = stored
        found: dict[str, torch.Tensor] = {}
        try:
            with closing(open_reader(self.checkpoint)) as reader:
                for name, first in groups["first"].items():
                    total = read_tensor(reader, groups["high"][name]) + read_tensor(reader, groups["low"][name])
                    kept = groups.get("kept", {}).get(name)
                    merged = self.state.quotient(total, None if kept is None else read_tensor(reader, kept))
                    found[name] = merged.to(first.dtype.torch)
                for name, stored in groups.get("fixed", {}).items():
                    found[name] = read_tensor(reader, stored)
        except KeyError as error:
            raise MalformedCheckpointError(f"{error} is missing from the state", where=self.where) from None
        return found
