"""Hashing beside a run, and what finds no room on a device."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergekit_px import merge, merge_state_dicts
from mergekit_px.execute import lane, provenance


def _state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(40, 30, generator=generator) for name in ("a.weight", "b.weight")}


@pytest.mark.parametrize("behind", [0, 1 << 40])
def test_inputs_are_hashed_whole_however_far_the_run_has_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: int
) -> None:
    monkeypatch.setattr(provenance, "_BEHIND", behind)
    models = [tmp_path / name for name in ("one", "two")]
    for seed, model in enumerate(models):
        model.mkdir()
        save_file(_state(seed), model / "model.safetensors")
    merge(models, output=tmp_path / "out")
    lock = json.loads((tmp_path / "out" / "pxmerge.lock.json").read_text())
    listed = [entry["files"]["model.safetensors"] for entry in lock["inputs"].values()]
    expected = [hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest() for model in models]
    assert [entry["sha256"] if isinstance(entry, dict) else entry for entry in listed] == expected


def test_what_finds_no_room_on_a_device_is_done_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    models, base = [_state(1), _state(2)], _state(0)
    expected = {name: merge_state_dicts(models, name, base=base, device="cpu") for name in ("tsv_m", "ties")}
    tried = []

    def full(self: lane.Lane, host: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cpu":
            return host
        tried.append(self.device)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lane, "pick_device", lambda text: torch.device("meta" if text == "cuda" else text))
    monkeypatch.setattr(lane.Lane, "to_device", full)
    for name, value in expected.items():
        found = merge_state_dicts(models, name, base=base, device="cuda")
        assert tried, name
        tried.clear()
        assert all(torch.equal(found[key], tensor) for key, tensor in value.items()), name
