"""Whatever layout a model is kept in, it merges rightly or is refused in one line that says why; never wrongly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from layouts import REFUSED, RIGHT, Request
from pipelines import all_tensors

from mergekit_px.cli import main


def run(folder: Path, models: dict[str, Request]) -> int:
    recipe = {"models": models, "merge": {"method": "linear", "sources": [*models]}, "output": {"dtype": "float32"}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    words = ["run", str(folder / "recipe.yaml"), "-o", str(folder / "out"), "--quiet"]
    pickled = any(folder.glob("*/*.bin")) or any(folder.glob("*/*.pt"))
    return main([*words, *(["--allow-pickle"] if pickled else [])])


@pytest.mark.parametrize("layout", RIGHT)
def test_the_mean_of_two_is_what_their_values_say(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    models, meant = zip(*(RIGHT[layout](tmp_path / f"m{seed}", seed) for seed in range(2)), strict=True)
    assert run(tmp_path, {"one": models[0], "other": models[1]}) == 0, capsys.readouterr().err
    out = {name.removeprefix("./"): tensor for name, tensor in all_tensors(tmp_path / "out").items()}
    assert meant[0].keys() <= out.keys() <= {*meant[0], "model.norm.weight"}
    for name, value in meant[0].items():
        if value.is_floating_point():
            value = ((value.double() + meant[1][name].double()) / 2).float()
        torch.testing.assert_close(out[name], value, rtol=2e-6, atol=1e-6)
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("layout", REFUSED)
def test_what_is_not_understood_is_refused_by_name(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write, told = REFUSED[layout]
    one, other = write(tmp_path)
    recipe = {"models": {"one": one, "other": other}, "merge": {"method": "linear", "sources": ["one", "other"]}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["run", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out")]) in (3, 4)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and told in errors[0]
    # Of what is found only in the values, the state of the run stays, hidden, and no file by a name of the result.
    assert not [path for path in (tmp_path / "out").glob("*") if path.name != ".pxmerge"]
