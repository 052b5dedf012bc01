"""Report rows: plain data, and the numbers that the definitions give."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mergekit_px.kernels.spectral_report import matrix_report


def draw(count: int, shape: tuple[int, int] = (24, 18)) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=random) * (1 + number) for number in range(count)]


def test_row_holds_what_the_definitions_give() -> None:
    deltas = draw(3)
    merged = sum(deltas[1:], deltas[0])
    base = (torch.randn(24, 18, generator=torch.Generator().manual_seed(1)) * 350).bfloat16()
    row = matrix_report("w", deltas, ["a", "b", "c"], components=5, merged=merged, base=base)
    assert json.loads(json.dumps(row)) == row
    assert row["tensor"] == "w" and row["shape"] == [24, 18]

    spectra = [np.linalg.svd(delta.double().numpy(), compute_uv=False) for delta in deltas]
    largest = sorted(((value, who) for who, values in enumerate(spectra) for value in values), reverse=True)[:5]
    pool = [sum(value**2 for value, who in largest if who == source) for source in range(3)]
    u, s, _ = np.linalg.svd(merged.double().numpy(), full_matrices=False)
    left = np.sqrt(np.maximum(1 - np.cumsum(s**2) / np.sum(s**2), 0))
    rank = int(np.argmax(left <= 0.05)) + 1
    for who, entry in enumerate(row["sources"]):
        values = spectra[who]
        assert entry["source"] == "abc"[who]
        np.testing.assert_allclose(entry["spectrum"], values[:5], rtol=1e-5)
        assert entry["norm"] == pytest.approx(np.linalg.norm(values), rel=1e-6)
        assert entry["energy_kept"] == pytest.approx(np.sum(values[:5] ** 2) / np.sum(values**2), rel=1e-5)
        assert entry["energy_of_first"] == pytest.approx(values[0] ** 2 / np.sum(values**2), rel=1e-5)
        assert entry["pool_share"] == pytest.approx(pool[who] / sum(pool), rel=1e-5)
        inside = u[:, :rank].T @ deltas[who].double().numpy()
        assert entry["alignment"] == pytest.approx(np.linalg.norm(inside) / np.linalg.norm(values), rel=1e-5)
        assert entry["below_noise_edge"] == int(np.sum(values[:5] <= row["noise_edge"]))
    assert row["sources"][0]["below_noise_edge"] != row["sources"][2]["below_noise_edge"]
    np.testing.assert_allclose(row["merged"]["spectrum"], s[:5], rtol=1e-5)

    k = 18 // 3
    parts = [np.linalg.svd(delta.double().numpy(), full_matrices=False) for delta in deltas]
    us, vs = np.hstack([p[0][:, :k] for p in parts]), np.hstack([p[2][:k].T for p in parts])
    ss = np.concatenate([p[1][:k] for p in parts])
    sti = np.abs((us.T @ us - np.eye(18)) @ np.diag(ss) @ (vs.T @ vs - np.eye(18))).sum()
    assert row["interference"] == pytest.approx(sti, rel=1e-4)
    assert row["interference_relative"] == pytest.approx(sti / ss.sum(), rel=1e-4)


def test_without_base_and_merge_their_columns_are_left_out() -> None:
    row = matrix_report("w", draw(2), ["a", "b"], components=4)
    assert row["noise_edge"] is None and "merged" not in row
    assert "alignment" not in row["sources"][0] and row["sources"][0]["below_noise_edge"] is None


def test_zero_sources_have_empty_spectra() -> None:
    row = matrix_report("w", [torch.zeros(6, 5)] * 2, ["a", "b"], components=4, merged=torch.zeros(6, 5))
    assert row["interference"] == row["interference_relative"] == 0.0
    assert [entry["spectrum"] for entry in row["sources"]] == [[], []]
    assert [entry["pool_share"] for entry in row["sources"]] == [0.0, 0.0]
    assert [entry["alignment"] for entry in row["sources"]] == [1.0, 1.0]
