"""Warnings of methods reach the user once, however many tensors they are about."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergekit_px.cli import main
from mergekit_px.execute.warnings import gathered_warnings


def test_warnings_that_differ_in_numbers_are_one_line_in_any_order() -> None:
    log = logging.getLogger("mergekit_px.methods.some")
    texts = [("b", "3 of 5 are weak (1e-05)"), ("a", "4 of 5 are weak (0.25)"), ("a", "4 of 5 are weak (0.25)")]
    for order in (texts, texts[::-1]):
        with gathered_warnings() as warnings:
            for tensor, text in order:
                log.warning("%s: %s", tensor, text)
            log.warning("c: something else")
        assert warnings.lines() == (
            "a: 4 of 5 are weak (0.25) (and the like in 1 other tensor)",
            "c: something else",
        )


def test_logging_is_as_before_afterwards(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("mergekit_px.methods.some")
    with gathered_warnings():
        log.warning("w: inside")
    log.warning("w: outside")
    assert [record.getMessage() for record in caplog.records] == ["w: outside"]


@pytest.mark.parametrize("quiet", [False, True])
def test_amplified_noise_is_told_once_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    random = torch.Generator().manual_seed(0)
    base = {f"layers.{n}.weight": (torch.randn(40, 30, generator=random) * 0.02).bfloat16() for n in range(3)}
    for name in ("base", "first", "second"):
        tensors = base
        if name != "base":
            update = torch.randn(40, 2, generator=random) @ torch.randn(2, 30, generator=random) * 0.003
            tensors = {key: (value.float() + update).bfloat16() for key, value in base.items()}
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    line = ["iso-c", "--sources", str(tmp_path / "first"), str(tmp_path / "second"), "--base", str(tmp_path / "base")]
    line += ["-o", str(tmp_path / "out"), "--no-noise-floor", "-q" if quiet else "--json"]
    assert main(line) == 0
    out, err = capsys.readouterr()
    assert err.count("components lie below rounding noise") == (0 if quiet else 1)
    if quiet:
        return
    (warning,) = json.loads(out)["warnings"]
    assert warning.startswith("layers.0.weight: ") and warning.endswith("(and the like in 2 other tensors)")
