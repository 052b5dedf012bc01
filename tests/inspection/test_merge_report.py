"""``pxmerge report`` against dense float64 arithmetic, on the kinds of merges that there are."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mergekit_px as px
from mergekit_px.cli import main
from mergekit_px.inspection.changes import CellChange
from mergekit_px.inspection.merge_report import MergeReport, report_on
from mergekit_px.testing.checkpoints import fine_tune, tiny_llama_config, tiny_llama_tensors, write_checkpoint


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    base = tiny_llama_tensors()
    write_checkpoint("base", base, config=tiny_llama_config())
    for seed, name in enumerate(("math", "code"), 1):
        write_checkpoint(name, fine_tune(base, seed), config=tiny_llama_config())
    return tmp_path


def weights(name: str) -> dict[str, torch.Tensor]:
    return {key: tensor.double() for key, tensor in load_file(f"{name}/model.safetensors").items()}


def cell(report: MergeReport, module: str, layer: int | None) -> CellChange:
    (found,) = [each for each in report.changes.cells if (each.module, each.layer) == (module, layer)]
    return found


def test_measures_are_those_of_dense_arithmetic() -> None:
    px.merge(["math", "code"], "ties", base="base", density=0.4, output="merged")
    report = report_on(Path("merged"))
    name = "model.layers.1.mlp.up_proj.weight"
    base, math, code, merged = (weights(each)[name].numpy().ravel() for each in ("base", "math", "code", "merged"))
    found = cell(report, "mlp.up_proj", 1)
    change = merged - base
    sources = np.stack([math - base, code - base])
    assert report.changes.sources == ["math", "code"] and report.changes.base == "base"
    assert found.relative == pytest.approx(np.linalg.norm(change) / np.linalg.norm(base))
    assert found.energy == pytest.approx((change @ change) / (sources**2).sum(1).mean())
    assert found.sign_conflicts == pytest.approx(np.mean(sources[0] * sources[1] < 0))
    nearest = np.linalg.lstsq(sources.T, change, rcond=None)[0]
    assert [each.weight for each in found.sources] == pytest.approx(list(nearest))
    assert found.explained == pytest.approx((nearest @ sources @ change) / (change @ change))
    assert sum(each.share or 0 for each in found.sources) == pytest.approx(found.explained)
    for each, source in zip(found.sources, sources, strict=True):
        assert each.cosine == pytest.approx(change @ source / np.linalg.norm(change) / np.linalg.norm(source))
        assert each.distance == pytest.approx(np.linalg.norm(change - source) / np.linalg.norm(source))
    assert report.changes.total.tensors == len(weights("base")) and not report.changes.unmeasured


RECIPE = """
pxmerge: 1
models: {base: base, math: math, code: code}
steps:
  mixed:
    method: task_arithmetic
    base: base
    sources: {math: 0.7, code: 0.5}
    rules:
      - {match: "*.mlp.*", weights: {math: 0.2}}
      - {match: lm_head.weight, take: code}
  final:
    method: linear
    sources: {mixed: 0.9, base: 0.1}
output: {path: merged}
"""


def test_steps_and_rules_are_told_and_effective_weights_are_those_of_the_recipe() -> None:
    Path("recipe.yaml").write_text(RECIPE)
    px.run_recipe("recipe.yaml")
    report = report_on(Path("merged"))
    found = cell(report, "self_attn.q_proj", 0)
    assert [each.weight for each in found.sources] == pytest.approx([0.63, 0.45], abs=1e-4)
    assert found.explained == pytest.approx(1, abs=1e-6)
    assert cell(report, "mlp.down_proj", 0).sources[0].weight == pytest.approx(0.18, abs=1e-4)
    head = cell(report, "lm_head", None)
    assert [each.weight for each in head.sources] == pytest.approx([0, 0.9], abs=1e-4)
    groups = {tuple(group.rules): group for group in report.decisions}
    assert groups[()].methods == ["mixed: task_arithmetic", "final: linear"]
    assert groups["match: *.mlp.*, weights: math: 0.2",].modules[0] == "model.layers.0-1 mlp.down_proj"
    assert groups["match: *.mlp.*, weights: math: 0.2",].weights["mixed: math"] == "0.2"
    assert "match: lm_head.weight, take: code" in str(list(groups))


@pytest.mark.parametrize(
    ("words", "base", "measured"),
    [
        (("linear", "--sources", "math", "code"), None, [0.5, 0.5]),
        (("tsv-m", "--base", "mean", "--sources", "math", "code"), "mean of the sources", None),
        (("subtract", "math", "base"), None, [1.0, -1.0]),
    ],
    ids=["without a base", "around the mean", "a task vector"],
)
def test_every_kind_of_merge_has_a_report(words: tuple[str, ...], base: str | None, measured: list[float]) -> None:
    assert main([*words, "-o", "merged"]) == 0
    report = report_on(Path("merged"))
    assert report.changes.base == base
    if measured is not None:
        assert [each.weight for each in report.changes.total.sources] == pytest.approx(measured, abs=1e-4)
    assert (report.changes.total.relative is None) == (base is None)


def test_experts_have_a_grid_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{layer}.mlp.experts.{number}.up_proj.weight" for layer in (0, 1) for number in range(60)]
    base = {name: torch.randn(4, 4, generator=generator) for name in names}
    write_checkpoint("moe", base)
    changed = {name: tensor + (0.5 if ".experts.7." in name else 0.01) for name, tensor in base.items()}
    write_checkpoint("tuned", changed)
    assert main(["task-arithmetic", "--base", "moe", "--sources", "tuned", "--report", "page.html"]) == 0
    report = report_on(Path("merged"))
    assert [(each.module, each.layer, each.tensors) for each in report.changes.cells] == [
        ("mlp.experts.*.up_proj", 0, 60),
        ("mlp.experts.*.up_proj", 1, 60),
    ]
    assert len(report.changes.experts) == 120
    most = max(report.changes.experts, key=lambda each: each.relative or 0)
    assert most.module == "expert 7"
    assert ">expert 59</th>" in Path("page.html").read_text()


class _Page(HTMLParser):
    """What a page refers to, and its headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("href", "src"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")


def test_the_page_holds_everything_that_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    Path("<b>code").symlink_to("code")
    words = ["ties", "--base", "base", "--sources", "math", "<b>code", "--density", "0.4"]
    assert main([*words, "--report", "during.html"]) == 0
    capsys.readouterr()
    assert main(["report", "merged", "--json"]) == 0
    document = MergeReport.model_validate_json(capsys.readouterr().out)
    assert document.speed is None
    during, after = Path("during.html").read_text(), Path("merged-report.html").read_text()
    assert "peak memory" in during and "does not tell how long it took" in after
    page = _Page(after)
    assert "<b>code" not in after and "script" not in page.tags
    assert all(address.startswith("#") or address == "data:," for address in page.addresses)
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    for title in ("Relative change", "Sign conflicts", "Energy kept", "Cosine", "Share of the source"):
        assert title in after


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("report", "base"), 3, "only what pxmerge has merged can be verified"),
        (("report", "merged", "-o", "page.png"), 2, "name a .html file"),
        (("report", "merged", "-o", "merged/page.html"), 2, "write it beside the folder"),
        (("linear", "--sources", "math", "code", "--dry-run", "--report", "p.html"), 2, "a plan reads no weights"),
        (("svd", "--sources", "math", "--base", "base", "--as", "components", "--report", "p.html"), 2, "a checkpoint"),
    ],
)
def test_what_has_no_report_is_refused_in_one_line(
    words: tuple[str, ...], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["linear", "--sources", "math", "code"]) == 0
    capsys.readouterr()
    assert main(list(words)) == code
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert says in error
    assert not Path("p.html").exists()


def test_a_merge_that_changed_since_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["linear", "--sources", "math", "code"]) == 0
    write_checkpoint("merged", weights("base"), dtype=torch.float32)
    assert main(["report", "merged"]) == 0
    assert "warning: model.safetensors is not what was merged" in capsys.readouterr().err
    assert main(["linear", "--sources", "math", "code", "-o", "again"]) == 0
    write_checkpoint("math", weights("code"), dtype=torch.float32, config=tiny_llama_config())
    assert main(["report", "again"]) == 3
    assert "error: " in capsys.readouterr().err
