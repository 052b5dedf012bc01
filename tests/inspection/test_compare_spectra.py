"""Effective ranks and alignments against dense numpy, through the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mergekit_px.cli import main
from mergekit_px.testing import write_checkpoint


@pytest.fixture
def tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, torch.Tensor]]:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    shapes = {"up": (12, 8), "conv": (6, 2, 3, 3), "same": (4, 4), "norm": (8,)}
    base = {name: draw(*shape) for name, shape in shapes.items()} | {"ids": torch.arange(6).reshape(2, 3)}
    found = {"base": base}
    for name, rank in (("x", 1), ("y", 2)):
        left, right = draw(12, rank), draw(rank, 8)
        found[name] = base | {"up": base["up"] + left @ right, "conv": base["conv"] + draw(6, 2, 3, 3)}
    for name, weights in found.items():
        write_checkpoint(name, weights)
    return found


def compared(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    capsys.readouterr()
    assert main(["compare", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_ranks_and_alignments_equal_dense_arithmetic(tensors, capsys: pytest.CaptureFixture[str]) -> None:
    document = compared(capsys, "x", "y", "--base", "base", "--spectral")
    rows = {row["name"]: row for row in document["tensors"]}
    for name in ("up", "conv"):
        deltas = [(tensors[m][name].double() - tensors["base"][name].double()).flatten(1).numpy() for m in "xy"]
        bases = []
        for place, delta in enumerate(deltas):
            u, s, _ = np.linalg.svd(delta, full_matrices=False)
            share = s[s > 1e-5] / s[s > 1e-5].sum()
            entropy = -(share * np.log(share)).sum()
            assert rows[name]["effective_ranks"][place] == pytest.approx(np.exp(entropy), rel=1e-4)
            left = [np.sqrt((s[k:] ** 2).sum() / (s**2).sum()) for k in range(len(s) + 1)]
            bases.append(u[:, : next(k for k, error in enumerate(left) if error <= 0.05)])
        for i, delta in enumerate(deltas):
            for j, basis in enumerate(bases):
                expected = np.linalg.norm(basis.T @ delta) / np.linalg.norm(delta)
                assert rows[name]["alignments"][i][j] == pytest.approx(expected, abs=1e-5)
    assert rows["same"]["effective_ranks"] == [None, None]
    assert rows["norm"]["effective_ranks"] is None and rows["ids"]["alignments"] is None
    total = document["total"]
    assert total["effective_ranks"][0] == pytest.approx(
        (rows["up"]["effective_ranks"][0] + rows["conv"]["effective_ranks"][0]) / 2
    )


def test_a_stack_of_experts_counts_by_its_matrices(tmp_path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    stack = torch.zeros(3, 8, 6)
    for place, rank in enumerate((1, 2)):  # the third expert is the base's
        left, _ = torch.linalg.qr(torch.randn(8, rank, generator=generator))
        right, _ = torch.linalg.qr(torch.randn(6, rank, generator=generator))
        stack[place] = left @ right.T
    write_checkpoint("base", {"experts.weight": torch.zeros(3, 8, 6)})
    write_checkpoint("x", {"experts.weight": stack})
    (row,) = compared(capsys, "x", "x", "--base", "base", "--spectral")["tensors"]
    assert row["effective_ranks"] == pytest.approx([1.5, 1.5], rel=1e-5)
    assert np.array(row["alignments"]) == pytest.approx(1, abs=1e-5)


def test_without_the_flag_nothing_is_decomposed(tensors, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_px.inspection.compare.spectra", None)
    document = compared(capsys, "x", "y", "--base", "base")
    assert "effective_ranks" not in document["total"] and "alignments" not in document["tensors"][0]


def test_a_difference_that_is_not_finite_has_no_rank(tensors, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tensors["x"] | {"up": tensors["x"]["up"].clone()}
    bad["up"][0, 0] = float("inf")
    write_checkpoint("bad", bad)
    row = next(r for r in compared(capsys, "bad", "y", "--base", "base", "--spectral")["tensors"] if r["name"] == "up")
    assert row["effective_ranks"][0] is None and row["effective_ranks"][1] is not None
    assert row["alignments"][0] == [None, None] and row["alignments"][1][0] is None


@pytest.mark.parametrize("models", [("x",), ("x", "y")])
def test_the_tables_show_them(tensors, capsys, monkeypatch: pytest.MonkeyPatch, models: tuple[str, ...]) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["compare", *models, "--base", "base", "--spectral"]) == 0
    table = capsys.readouterr().out.partition("By tensor")[2].splitlines()
    assert ("aligned" in table[1]) == (len(models) == 2) and "rank" in table[1]
    row = next(line.split() for line in table if line.startswith("up"))
    assert row[4] == "1"  # the first model's difference has rank one
