from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergekit_px.cli import main
from mergekit_px.testing import tiny_llama_config, tiny_llama_tensors, write_checkpoint


def model(folder: Path, tokens: list[str], seed: int) -> dict[str, torch.Tensor]:
    tensors = tiny_llama_tensors(seed=seed)
    write_checkpoint(folder, tensors, config=tiny_llama_config())
    vocabulary = {"type": "WordLevel", "vocab": {token: place for place, token in enumerate(tokens)}}
    (folder / "tokenizer.json").write_text(json.dumps({"model": vocabulary}))
    return tensors


def test_a_tokenizer_is_transplanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = model(tmp_path / "one", [f"t{number}" for number in range(64)], 1)
    model(tmp_path / "other", [*(f"t{number}" for number in range(62, -1, -1)), "t1t2"], 2)
    out = str(tmp_path / "out")
    words = ["tokens", "transplant", str(tmp_path / "one"), "--tokenizer-of", str(tmp_path / "other"), "-o", out]
    assert main([*words, "--json"]) == 0
    embedding = "model.embed_tokens.weight"
    result = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(result[embedding][:63], one[embedding][:63].flip(0))
    assert torch.allclose(result[embedding][63].float(), one[embedding][1:3].float().mean(0), atol=1e-2)
    assert torch.equal(result["model.norm.weight"], one["model.norm.weight"])
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "other/tokenizer.json").read_bytes()
    assert "1 rows for tokens that it lacks ('t1t2'): the mean of those of its pieces" in capsys.readouterr().err


@pytest.mark.parametrize("fit", ["omp", "nearest"])
def test_absent_rows_are_mixtures_fitted_in_the_donor(fit: str, tmp_path: Path) -> None:
    """A token whose row in the donor is twice that of another becomes twice that one's own row by pursuit, and equal
    to it as its nearest neighbour."""
    one = model(tmp_path / "one", [f"t{number}" for number in range(64)], 1)
    donor = model(tmp_path / "other", [*(f"t{number}" for number in range(63)), "new"], 2)
    head = "model.embed_tokens.weight"
    donor[head][63] = 2 * donor[head][7]
    for name in [name for name in donor if "lm_head" in name]:
        donor[name][63] = 2 * donor[name][7]
    write_checkpoint(tmp_path / "other", donor, config=tiny_llama_config())
    command = ["tokens", "transplant", str(tmp_path / "one"), "--tokenizer-of", str(tmp_path / "other")]
    out = str(tmp_path / "out")
    assert main([*command, "--method", fit, "--neighbours", "1", "-o", out, "--dtype", "float32"]) == 0
    result = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(result[head][:63], one[head][:63].float())
    expected = one[head][7].float() * (2 if fit == "omp" else 1)
    assert torch.allclose(result[head][63], expected, rtol=1e-3)
    assert any("rows.safetensors" in line for line in (tmp_path / "out/pxmerge.lock.json").read_text().splitlines())


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [(["--pad-to", "0"], 2, "pad-to"), (["--method", "guess"], 2, "guess"), ([], 4, "no tokenizer")],
)
def test_what_is_refused(
    more: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "other"):
        model(tmp_path / name, ["a"] * 64, 1)
    (tmp_path / "other/tokenizer.json").unlink()
    command = ["tokens", "transplant", str(tmp_path / "one"), "--tokenizer-of", str(tmp_path / "other")]
    assert main([*command, "-o", str(tmp_path / "out"), *more]) == code
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
