"""``anisotropic`` and its files: exact sums, what the plan's hash sees, and files that are not what they should be."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mergekit_px.artefacts.coefficients import (
    COEFFICIENTS_FILE,
    HEADER_KEY,
    CoefficientTable,
    group_numbers,
    read_table,
    write_table,
)
from mergekit_px.cli import main
from mergekit_px.errors import InputError, InputNotFoundError, UsageError
from mergekit_px.plan.build import build_plan
from mergekit_px.plan.method_catalog import method_catalog
from mergekit_px.recipe.load import recipe_from_mapping
from mergekit_px.state_dicts import merge_state_dicts
from mergekit_px.testing import apply_method, check_method, merge_tensors
from mergekit_px.testing.checkpoints import write_checkpoint

TENSORS = {"a.weight": (0, 1), "b.weight": (1, 1), "b.bias": (1, 1)}


def table(values: list[list[float]], tensors: dict[str, tuple[int, int]] | None = None, seed: int = 3) -> Any:
    names = tuple(f"source {number}" for number in range(len(values)))
    blocks = tuple(f"block {number}" for number in range(len(values[0])))
    return CoefficientTable(names, blocks, tensors or TENSORS, seed, tuple(map(tuple, values)))


def models(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (6, 5), "b.weight": (40,), "b.bias": (3, 2, 2)}
    return [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(count)]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_table(table([[0.25, -1.0], [1.5, 0.1], [0.0, 3.0]]), tmp_path / COEFFICIENTS_FILE)
    return tmp_path


def test_conformance(tmp_path: Path) -> None:
    for method in ("anisotropic", "anisotropic_groups"):
        check_method(method, identity=True, symmetric=True)
        write_table(table([[0.25], [1.5], [-0.5]], {"t": (0, 1)}), tmp_path / COEFFICIENTS_FILE)
        check_method(method, {"coefficients": str(tmp_path)})
    write_table(table([[0.25, 1.0, -2.0]] * 3, {"t": (0, 3)}), tmp_path / COEFFICIENTS_FILE)
    check_method("anisotropic_groups", {"coefficients": str(tmp_path)})


def test_a_table_comes_back_as_it_was_written(written: Path) -> None:
    path, found, sha256 = read_table(written)
    assert (path, found, sha256) == read_table(written / COEFFICIENTS_FILE)
    assert path == written / COEFFICIENTS_FILE and sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.values == ((0.25, -1.0), (1.5, 0.1), (0.0, 3.0)) and found.seed == 3
    assert dict(found.tensors) == TENSORS and found.sources[2] == "source 2"


def test_each_block_has_its_own_coefficients(written: Path) -> None:
    base, *sources = models(4)
    merged = merge_state_dicts(sources, "anisotropic", base=base, coefficients=str(written))
    for name, row in (("a.weight", [0.25, 1.5, 0.0]), ("b.weight", [-1, 0.1, 3]), ("b.bias", [-1, 0.1, 3])):
        tau = np.stack([(source[name] - base[name]).numpy().astype(np.float64) for source in sources])
        expected = base[name].numpy() + np.tensordot(row, tau, axes=1)
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_without_a_file_it_is_the_average_and_a_one_hot_row_is_that_source(tmp_path: Path) -> None:
    base, *sources = models(4)
    merged = merge_state_dicts(sources, "anisotropic", base=base)
    write_table(table([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]), tmp_path / "one.safetensors")
    second = merge_state_dicts(sources, "anisotropic", base=base, coefficients=str(tmp_path / "one.safetensors"))
    for name in base:
        mean = torch.stack([source[name] for source in sources]).double().mean(dim=0).float()
        torch.testing.assert_close(merged[name], mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(second[name], sources[1][name], rtol=1e-6, atol=1e-6)


def test_random_groups(tmp_path: Path) -> None:
    values = [[2.0, -1.0, 0.5], [0.0, 1.0, 4.0]]
    write_table(table(values, {"t": (0, 3)}, seed=9), tmp_path / COEFFICIENTS_FILE)
    base, first, second = (torch.randn(50, 7, generator=torch.Generator().manual_seed(n)) for n in range(3))
    groups = group_numbers(9, "t", 350, 3)
    assert set(groups.tolist()) == {0, 1, 2} and torch.bincount(groups).min() > 80
    assert not torch.equal(groups, group_numbers(10, "t", 350, 3))
    params = {"coefficients": str(tmp_path)}
    merged = apply_method("anisotropic_groups", [first, second], params=params, base=base)
    rows = np.array(values)[:, groups.numpy()].reshape(2, 50, 7)
    tau = np.stack([(one - base).numpy().astype(np.float64) for one in (first, second)])
    np.testing.assert_allclose(merged.numpy(), base.numpy() + (rows * tau).sum(axis=0), rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="anisotropic_groups"):
        apply_method("anisotropic", [first, second], params=params, base=base)


def test_the_hash_of_a_plan_follows_the_content(written: Path, tmp_path: Path) -> None:
    names = [str(write_checkpoint(tmp_path / f"m{n}", tensors)) for n, tensors in enumerate(models(4))]
    recipe = {
        "pxmerge": 1,
        "models": {f"m{n}": name for n, name in enumerate(names)},
        "merge": {
            "method": "anisotropic",
            "base": "m0",
            "sources": ["m1", "m2", "m3"],
            "params": {"coefficients": str(written)},
        },
        "output": {"path": str(tmp_path / "out")},
    }

    def plan_hash() -> str:
        return build_plan(recipe_from_mapping(recipe, methods=method_catalog())).hash

    first = plan_hash()
    assert plan_hash() == first
    write_table(table([[0.25, -1.0], [1.5, 0.1], [0.0, 3.5]]), written / COEFFICIENTS_FILE)
    assert plan_hash() != first


def test_the_file_is_pinned_and_sought_beside_the_recipe(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(write_checkpoint(tmp_path / f"m{n}", tensors)) for n, tensors in enumerate(models(4))]
    (tmp_path / "elsewhere").mkdir()
    recipe = {
        "pxmerge": 1,
        "models": {f"m{n}": name for n, name in enumerate(names)},
        "merge": {"method": "anisotropic", "base": "m0", "sources": ["m1", "m2", "m3"]},
        "output": {"path": str(tmp_path / "out")},
    }
    recipe["merge"]["params"] = {"coefficients": COEFFICIENTS_FILE}  # type: ignore[index]
    (written / "recipe.yaml").write_text(json.dumps(recipe))
    monkeypatch.chdir(tmp_path / "elsewhere")
    sha256 = hashlib.sha256((written / COEFFICIENTS_FILE).read_bytes()).hexdigest()
    assert main(["plan", str(written / "recipe.yaml")]) == 0
    assert sha256[:12] in capsys.readouterr().out
    assert main(["run", str(written / "recipe.yaml"), "-q"]) == 0
    pinned = json.loads((tmp_path / "out" / "pxmerge.lock.json").read_text())["artefacts"]
    size = (written / COEFFICIENTS_FILE).stat().st_size
    assert pinned == {COEFFICIENTS_FILE: {"kind": "coefficients", "size": size, "sha256": sha256}}
    assert sha256 in (tmp_path / "out" / "README.md").read_text()
    assert main(["run", str(written / "recipe.yaml")]) == 0
    assert "up to date" in capsys.readouterr().err
    write_table(table([[0.25, -1.0], [1.5, 0.1], [0.0, 3.5]]), written / COEFFICIENTS_FILE)
    assert main(["run", str(written / "recipe.yaml"), "-q"]) == 4
    assert main(["run", str(written / "recipe.yaml"), "-o", str(written), "--overwrite", "-q"]) == 4
    assert read_table(written)[1].values[2] == (0.0, 3.5)


def test_a_command(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, *sources = [write_checkpoint(tmp_path / f"m{n}", tensors) for n, tensors in enumerate(models(4))]
    words = ["anisotropic", "--base", str(base), "--sources", *map(str, sources), "-o", str(tmp_path / "out")]
    assert main([*words, "--coefficients", str(written), "-q"]) == 0
    assert main([*words[:6], "-o", str(tmp_path / "two"), "--coefficients", str(written), "-q"]) == 2
    assert "of 3 sources, 2 take part" in capsys.readouterr().err
    assert main([*words[:-1], str(tmp_path / "none"), "--coefficients", str(tmp_path / "no"), "-q"]) == 3
    assert "no such file or folder" in capsys.readouterr().err


def test_other_tensors_or_sources_are_refused(written: Path) -> None:
    base, *sources = models(4)
    params = {"coefficients": str(written)}
    other = [{"c.weight": tensors["a.weight"]} for tensors in (base, *sources)]
    with pytest.raises(UsageError, match=r"no coefficients for c\.weight"):
        merge_tensors("anisotropic", other[1:], params=params, base=other[0])
    with pytest.raises(UsageError, match="of 3 sources, 2 take part"):
        merge_tensors("anisotropic", sources[:2], params=params, base=base)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"sources": ["one"]},
        {"tensors": {"a": [0, 3]}},
        {"tensors": {"a": [0]}},
        {"tensors": {"a": ["0", 1]}},
        {"tensors": []},
        {"seed": None},
    ],
)
def test_damaged_headers_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    header = {"version": 1, "sources": ["a", "b"], "blocks": ["x"], "tensors": {"a": [0, 1]}, "seed": 0}
    values = {"coefficients": torch.ones(2, 1, dtype=torch.float64)}
    path = tmp_path / "table.safetensors"
    save_file(values, path, metadata={HEADER_KEY: json.dumps(header)})
    assert read_table(path)[1].values == ((1.0,), (1.0,))
    save_file(values, path, metadata={HEADER_KEY: json.dumps(header | change)})
    with pytest.raises(InputError):
        read_table(path)


def test_files_that_are_not_coefficients_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", models(1)[0])
    with pytest.raises(InputError, match="not a file of coefficients"):
        read_table(folder / "model.safetensors")
    with pytest.raises(InputNotFoundError):
        read_table(folder)
    write_table(table([[float("nan"), 0.0]]), tmp_path / "nan.safetensors")
    with pytest.raises(InputError, match="not finite"):
        read_table(tmp_path / "nan.safetensors")
