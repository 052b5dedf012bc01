"""``pxmerge advise``: what it measures, where its figures are from, and that its recipe plans."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import mergekit_px
from mergekit_px.cli import main
from mergekit_px.errors import InputError, NonFiniteError, PlanError, UsageError
from mergekit_px.inspection.evidence import METHODS, PAGE, SUITES, nearest_suite
from mergekit_px.testing.checkpoints import fine_tune, tiny_llama_config, tiny_llama_tensors, write_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    tensors = tiny_llama_tensors()
    write_checkpoint(tmp_path / "base", tensors, config=tiny_llama_config())
    for number, name in enumerate("abc"):
        write_checkpoint(tmp_path / name, fine_tune(tensors, number + 1, size=0.004), config=tiny_llama_config())
    return tmp_path


def flat(folder: Path) -> np.ndarray:
    tensors = {tensor.name: tensor for tensor in mergekit_px.open_checkpoint(folder).tensors.values()}
    from safetensors.torch import load_file

    loaded = load_file(folder / "model.safetensors")
    return np.concatenate([loaded[name].double().numpy().ravel() for name in sorted(tensors)])


def test_what_models_are_to_one_another(models: Path) -> None:
    advice = mergekit_px.advise([models / name for name in "abc"], base=models / "base")
    base = flat(models / "base")
    changes = [flat(models / name) - base for name in "abc"]
    for source, change in zip(advice.relations.sources, changes, strict=True):
        assert source.relative == pytest.approx(np.linalg.norm(change) / np.linalg.norm(base))
    first, second = changes[:2]
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    assert advice.relations.cosines[0][1] == pytest.approx(cosine, abs=1e-9)
    signs = np.sign(np.stack(changes))
    differ = (signs.max(axis=0) > 0) & (signs.min(axis=0) < 0)
    assert advice.relations.sign_conflicts == pytest.approx(differ.mean(), abs=1e-3)
    assert advice.relations.matrices == 14
    assert 0 < (advice.relations.rank_share or 0) <= 1


def test_the_recipe_plans_and_has_the_best_method_first(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = models / "recipe.yaml"
    sources = [str(models / name) for name in "abc"]
    assert main(["advise", *sources, "--base", str(models / "base"), "-o", str(recipe), "--json"]) == 0
    advice = json.loads(capsys.readouterr().out)
    scores = [method["score"] for method in advice["methods"]]
    assert scores == sorted(scores, reverse=True)
    assert yaml.safe_load(recipe.read_text())["merge"]["method"] == advice["methods"][0]["method"]
    assert recipe.read_text() == advice["recipe"]
    assert all(statement["measured"] or statement["evidence"] for statement in advice["statements"])
    assert main(["plan", str(recipe), "--set", f"output.path={models / 'merged'}"]) == 0
    assert main(["advise", *sources, "-o", str(recipe)]) == 4  # it is there already


def test_adapters_and_task_vectors_stand_for_their_changes(models: Path) -> None:
    base, name = str(models / "base"), str(models / "a")
    for line in (["adapter", "extract", base, name, "--rank", "4", "-o", f"{name}-lora"], ["subtract", name, base]):
        assert main([*line, "-q", *([] if "-o" in line else ["-o", f"{name}-vector"])]) == 0
    advice = mergekit_px.advise([models / "a-lora", models / "b", models / "a-vector"], base=base)
    lora, _, vector = advice.relations.sources
    assert vector.relative == pytest.approx(mergekit_px.compare(name, base=base)["total"]["models"][0]["relative"])
    assert (lora.rank_share or 0) < 0.2 < 0.8 < (vector.rank_share or 0)
    assert (advice.relations.cosines[2][0] or 0) > 0.3


def test_without_a_base_only_averages_are_advised(models: Path) -> None:
    advice = mergekit_px.advise([models / "a", models / "b"])
    assert [method.method for method in advice.methods] == ["linear"]
    assert any("--base" in statement.text for statement in advice.statements)
    assert advice.relations.sources[0].relative is None
    strangers = write_checkpoint(models / "other", tiny_llama_tensors(seed=9), config=tiny_llama_config())
    advice = mergekit_px.advise([models / "a", strangers])
    assert "do not look like fine-tunes of one model" in advice.statements[0].text


def test_copies_are_left_out(models: Path) -> None:
    advice = mergekit_px.advise([models / "a", models / "base", models / "b", models / "a"], base=models / "base")
    assert [statement.text for statement in advice.statements[:2]] == [
        "'base' has the weights of the base and is left out",
        "'a-2' has the weights of 'a' and is left out",
    ]
    assert yaml.safe_load(advice.recipe)["merge"]["sources"] == ["a", "b"]
    with pytest.raises(InputError, match="nothing is left to merge"):
        mergekit_px.advise([models / "a", models / "a"])


def test_what_cannot_be_merged_is_refused(models: Path) -> None:
    wide = write_checkpoint(models / "wide", tiny_llama_tensors(hidden=64), config=tiny_llama_config(hidden=64))
    with pytest.raises(PlanError):
        mergekit_px.advise([models / "a", wide], base=models / "base")
    with pytest.raises(UsageError, match="one model alone"):
        mergekit_px.advise([models / "a"], base=models / "base")
    broken = dict(tiny_llama_tensors())
    broken["model.norm.weight"] = torch.full_like(broken["model.norm.weight"], torch.nan)
    write_checkpoint(models / "nan", broken, config=tiny_llama_config())
    with pytest.raises(NonFiniteError, match="'nan' holds a NaN"):
        mergekit_px.advise([models / "a", models / "nan"], base=models / "base")


def test_tokens_are_joined_where_tokenizers_differ(models: Path) -> None:
    for name in ("base", "a", "b"):
        tokens = {f"t{place}": place for place in range(64)}
        if name == "b":
            tokens = {f"s{place}" if place > 60 else f"t{place}": place for place in range(64)}
        model = {"type": "BPE", "vocab": tokens, "merges": []}
        (models / name / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))
    advice = mergekit_px.advise([models / "a", models / "b"], base=models / "base")
    assert yaml.safe_load(advice.recipe)["tokenizer"] == {"from": "union"}
    assert "tokenizers differ" in advice.statements[0].text


def test_the_figures_are_those_of_the_page() -> None:
    page = (ROOT / PAGE).read_text()
    names = {"`svd` orthogonalised, 100%": "svd 100%", "pre-trained encoder": "pre-trained"}
    tables: dict[str, dict[str, list[float]]] = {}
    for part in re.split(r"(?m)^## ", page)[1:]:
        for place, table in enumerate(re.findall(r"(?m)(?:^\|.*\n)+", part)):
            rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
            tables[f"{part.split('`')[1]} {place}"] = {
                names.get(row[0], row[0]): [float(cell) if re.fullmatch(r"[\d.]+", cell) else 0.0 for cell in row[1:]]
                for row in rows
            }
    where = {"spectral": ("spectral 0", 0), "spectral-far": ("spectral 1", 0)}
    where |= {f"few{far} {count}": ("few 0", 2 * bool(far) + count - 2) for far in ("", "-far") for count in (2, 3)}
    for suite in SUITES:
        table, column = where.get(suite.experiment) or where[f"{suite.experiment} {suite.sources}"]
        for title, score in {**suite.scores, "pre-trained": suite.pretrained}.items():
            if title != "pre-trained" or suite.experiment != "spectral-far":  # which the page has in its text
                assert tables[table][title][column] == score, (suite.experiment, title)
        lie = [row[suite.experiment.endswith("far")] for row in tables["few 1"].values()]
        assert lie == [suite.relative, suite.weights_cosine, suite.cosine, suite.rank_share, suite.alignment]
    assert {title for suite in SUITES for title in suite.scores} == set(METHODS)


def test_the_nearest_suite() -> None:
    assert nearest_suite(2, 0.04).experiment == "few"
    assert nearest_suite(2, 0.1).experiment == "few-far"
    assert nearest_suite(20, 0.001).experiment == "spectral"
    assert nearest_suite(4, None).sources == 3
