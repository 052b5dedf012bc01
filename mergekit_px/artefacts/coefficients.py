"""A table of merge coefficients, one for each source and block of parameters, as a small file.

The file is safetensors: a float64 tensor ``coefficients`` of shape (sources, blocks), and in the header a JSON text
that says which blocks each tensor of the model has.
"""

from __future__ import annotations

import array
import json
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_px.checkpoint.hashing import file_sha256
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.open import Checkpoint, open_checkpoint
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.checkpoint.replacement import replacement
from mergekit_px.checkpoint.whole import read_bytes
from mergekit_px.errors import InputError, UsageError

if TYPE_CHECKING:
    import torch

COEFFICIENTS_FILE = "coefficients.safetensors"
HEADER_KEY = "pxmerge.coefficients"

_TENSOR = "coefficients"
_VERSION = 1


@dataclass(frozen=True)
class CoefficientTable:
    """Coefficients of sources in blocks.

    Attributes:
        sources: what the sources were called when the coefficients were found, in their order.
        blocks: a name for each column.
        tensors: tensor name -> (first block, number of blocks); with more than one block each element belongs to one
            of them, drawn at random by `group_numbers`.
        seed: of that draw.
        values: for each source one coefficient for each block.
    """

    sources: tuple[str, ...]
    blocks: tuple[str, ...]
    tensors: Mapping[str, tuple[int, int]]
    seed: int
    values: tuple[tuple[float, ...], ...]

    def of_tensor(self, name: str, sources: int) -> tuple[tuple[float, ...], ...]:
        """For each source the coefficients of a tensor's blocks.

        Raises:
            UsageError: the table is of other tensors, or of another number of sources.
        """
        if sources != len(self.sources):
            raise UsageError(
                f"the coefficients are of {len(self.sources)} sources, {sources} take part in {shown(name)}",
                hint="give the sources in the order in which the coefficients were learned",
            )
        if name not in self.tensors:
            raise UsageError(f"there are no coefficients for {shown(name)}", hint="they are of another architecture")
        first, count = self.tensors[name]
        return tuple(row[first : first + count] for row in self.values)


def group_numbers(seed: int, name: str, elements: int, groups: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The block, from 0 to ``groups`` - 1, of each element of a flattened tensor; int64, shape (elements,)."""
    from mergekit_px.kernels.random import RandomStream

    uniform = RandomStream(seed, name, 0, elements, device).uniform(0)
    return uniform.double().mul_(groups).long()


def write_table(table: CoefficientTable, path: Path) -> None:
    """Write a table over what is there.

    Raises:
        WriteError: the disk refuses.
    """
    import torch
    from safetensors.torch import save

    header = {
        "version": _VERSION,
        "sources": table.sources,
        "blocks": table.blocks,
        "tensors": dict(table.tensors),
        "seed": table.seed,
    }
    values = torch.tensor(table.values, dtype=torch.float64).reshape(len(table.sources), len(table.blocks))
    with replacement(path) as file:
        file.write(save({_TENSOR: values}, metadata={HEADER_KEY: json.dumps(header, ensure_ascii=False)}))


def read_table(place: str | Path) -> tuple[Path, CoefficientTable, str]:
    """The table in a file, or in a folder's ``coefficients.safetensors``: the file, what it holds, and its sha256.

    Raises:
        InputError: no such file, not one of coefficients, or one that changes while it is read.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        path = path / COEFFICIENTS_FILE
    checkpoint = open_checkpoint(path)
    header = _header(checkpoint, path)
    sources, blocks = tuple(header["sources"]), tuple(header["blocks"])
    stored = checkpoint.tensors.get(_TENSOR)
    if stored is None or stored.dtype.name != "F64" or stored.shape != (len(sources), len(blocks)):
        raise _not_coefficients(path)
    with closing(open_reader(checkpoint)) as reader:
        numbers = array.array("d", bytes(read_bytes(reader, stored)))
    if sys.byteorder == "big":
        numbers.byteswap()
    width = len(blocks)
    values = tuple(tuple(numbers[row * width : (row + 1) * width]) for row in range(len(sources)))
    tensors = {name: (first, count) for name, (first, count) in header["tensors"].items()}
    if not all(first >= 0 and count >= 1 and first + count <= width for first, count in tensors.values()):
        raise _not_coefficients(path)
    if not all(abs(value) < float("inf") for row in values for value in row):
        raise InputError("a coefficient is not finite", where=str(path))
    file = next(iter(checkpoint.files.values()))
    return (
        path,
        CoefficientTable(sources, blocks, tensors, header["seed"], values),
        file_sha256(path, expected=file.identity),
    )


def _header(checkpoint: Checkpoint, path: Path) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads(checkpoint.metadata[HEADER_KEY])
        version = header["version"]
        lists = [header["sources"], header["blocks"], *header["tensors"].values()]
        whole = [header["seed"], *(number for pair in header["tensors"].values() for number in pair)]
        well_formed = all(isinstance(one, list) for one in lists) and all(type(one) is int for one in whole)
        well_formed = well_formed and all(len(pair) == 2 for pair in header["tensors"].values())
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise _not_coefficients(path) from None
    if version != _VERSION:
        raise InputError(f"its format is version {version}, {_VERSION} is known", where=str(path))
    if not well_formed:
        raise _not_coefficients(path)
    return header


def _not_coefficients(path: Path) -> InputError:
    return InputError(
        "not a file of coefficients", where=str(path), hint=f"`pxmerge ofasd` writes one, {COEFFICIENTS_FILE}"
    )
