"""Orthogonal matrices that are learned, and what they make of a task vector.

Weights are (out, in). With one matrix U of a piece ``D`` becomes ``U' D U`` (arXiv 2505.12021); with two it becomes
``Q_out' D Q_in``. Exactly orthogonal matrices leave the singular values of D as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from mergekit_px.learn.align.pieces import Piece
from mergekit_px.learn.align.settings import AlignSettings


class LazyTensors(Mapping[str, Tensor]):
    """By name, from what makes them."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


ROTATIONS_FILE = "rotations.safetensors"


class Rotations:
    """One or two matrices for each piece, the identity at first: two for pieces that are not square.

    Attributes:
        free: what learns, by the names of the matrices: the matrices themselves, or for ``cayley`` squares whose skew
            part counts.
    """

    def __init__(
        self, pieces: Sequence[Piece], settings: AlignSettings, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._pieces = pieces
        self._settings = settings
        self.free: dict[str, Tensor] = {}
        make = torch.zeros if settings.parametrisation == "cayley" else None
        for piece in pieces:
            for name, size in self._sizes(piece):
                start = torch.eye(size) if make is None else make(size, size)
                self.free[name] = start.to(device, dtype).requires_grad_()

    def matrix(self, name: str) -> Tensor:
        """One of the matrices; ``cayley``: ``(I - K)(I + K)^-1`` with ``K = S - S'``."""
        free = self.free[name]
        if self._settings.parametrisation != "cayley":
            return free
        skew = free - free.T
        identity = torch.eye(len(free), dtype=free.dtype, device=free.device)
        turned: Tensor = torch.linalg.solve(identity + skew, identity - skew)
        return turned

    def transport(self, deltas: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The task vector with its pieces turned, each tensor when it is asked for; everything else as it is."""
        pieces: dict[str, list[Piece]] = {}
        for piece in self._pieces:
            pieces.setdefault(piece.tensor, []).append(piece)
        return LazyTensors({name: partial(self._turned, deltas, name, pieces.get(name, ())) for name in deltas})

    def _turned(self, deltas: Mapping[str, Tensor], name: str, pieces: Sequence[Piece]) -> Tensor:
        moved = delta = deltas[name]
        for piece in pieces:
            sides = [self.matrix(side) for side, _ in self._sizes(piece)]
            turned = sides[0].T @ delta[piece.start : piece.stop] @ sides[-1]
            if piece.rows == len(delta):
                return turned
            rows = torch.arange(piece.start, piece.stop, device=turned.device)
            moved = moved.index_copy(0, rows, turned)
        return moved

    def penalty(self) -> Tensor | float:
        """``beta * mean ||U' U - I||_F`` over the matrices; 0 where they are orthogonal by construction."""
        if self._settings.parametrisation != "soft" or not self.free:
            return 0.0
        defects = [_defect(self.matrix(name)).norm() for name in self.free]
        return self._settings.orthogonality * torch.stack(defects).mean()

    @torch.no_grad()
    def retract(self) -> None:
        """Replace free matrices by the nearest orthogonal ones (their polar factors)."""
        for free in self.free.values():
            left, _, right = torch.linalg.svd(free)
            free.copy_(left @ right)

    @torch.no_grad()
    def orthogonality_error(self) -> float:
        """The largest ``||U' U - I||_F``."""
        return max((float(_defect(self.matrix(name)).norm()) for name in self.free), default=0.0)

    @torch.no_grad()
    def distances(self) -> dict[str, float]:
        """``||U - I||_F`` of each matrix: how far it has turned."""
        return {
            name: float((self.matrix(name) - torch.eye(len(free)).to(free)).norm()) for name, free in self.free.items()
        }

    @torch.no_grad()
    def matrices(self) -> dict[str, Tensor]:
        """All matrices, by name, on the CPU."""
        return {name: self.matrix(name).detach().cpu().contiguous() for name in self.free}

    def _sizes(self, piece: Piece) -> list[tuple[str, int]]:
        if self._settings.sided == "one" and piece.rows == piece.columns:
            return [(f"{piece.label}.both", piece.columns)]
        return [(f"{piece.label}.out", piece.rows), (f"{piece.label}.in", piece.columns)]


def _defect(matrix: Tensor) -> Tensor:
    return matrix.T @ matrix - torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
