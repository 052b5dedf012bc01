"""``pxmerge svd --as components``, ``--as lora``, ``--into`` and ``--report``, against dense float64 numpy."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mergekit_px.checkpoint.fingerprint import fingerprint
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.cli import main
from mergekit_px.kernels.pool import ComponentPool
from mergekit_px.learn.tune.components import read_components
from mergekit_px.testing import fine_tune, write_checkpoint

Run = Callable[..., int]
SHAPES = {
    "layers.0.up.weight": (12, 8),
    "layers.0.conv.weight": (6, 4, 3, 3),
    "layers.0.bias": (12,),
    "embed_tokens.weight": (10, 8),
}
MATRICES = {"layers.0.up.weight": (12, 8), "layers.0.conv.weight": (6, 36)}
TUNED = ("a", "b", "c", "d")


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, torch.Tensor]]:
    """A base and four fine-tunes of different strength, as folders in the working directory."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    found = {"base": base}
    found |= {name: fine_tune(base, seed + 1, size=0.1 * (seed + 1)) for seed, name in enumerate(TUNED)}
    for name, tensors in found.items():
        write_checkpoint(tmp_path / name, tensors)
    monkeypatch.chdir(tmp_path)
    return found


@pytest.fixture
def svd(weights) -> Run:
    return lambda *words: main(["svd", "-q", *map(str, words)])


@pytest.fixture
def refused(svd, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def call(*words: object) -> tuple[int, str]:
        code = svd(*words)
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return code, error

    return call


def delta(weights, source: str, name: str) -> np.ndarray:
    return weights[source][name].double().numpy() - weights["base"][name].double().numpy()


def pooled(matrices: list[np.ndarray], count: int, rule: str = "matrix") -> tuple[np.ndarray, np.ndarray]:
    """The sum of the kept components, and their singular values in the order of the rule."""
    found = []
    for source, matrix in enumerate(matrices):
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        size = np.linalg.norm(matrix) if rule == "normalised" else 1.0
        for place in range(len(s)):
            key = (place if rule == "quota" else 0, -s[place] / size, source, place)
            found.append((key, s[place], np.outer(u[:, place], vt[place]) * s[place]))
    kept = sorted(found, key=lambda entry: entry[0])[:count]
    return sum(entry[2] for entry in kept), np.array([entry[1] for entry in kept])


def product(tensors: dict[str, torch.Tensor], name: str) -> np.ndarray:
    u, s, v = (tensors[f"{name}.{part}"].double().numpy() for part in "USV")
    return (u * s) @ v.T


def components(folder: str = "pool") -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "components.safetensors")


def same_weights(one: str, other: str) -> None:
    found, wanted = (load_file(Path(folder) / "model.safetensors") for folder in (one, other))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", ["matrix", "quota", "normalised"])
def test_components_are_the_pooled_ones(svd, weights, rule: str) -> None:
    words = ("--as", "components", "--top-k", 5, "--pool", rule, "--scale", 0.5, "--weights", 1, -2, 0.5, "-o", "pool")
    assert svd("--base", "base", "--sources", "a", "b", "c", *words) == 0
    found = components()
    for name, shape in MATRICES.items():
        matrices = [w * delta(weights, s, name).reshape(shape) for s, w in zip("abc", (1, -2, 0.5), strict=True)]
        total, values = pooled(matrices, 5, rule)
        np.testing.assert_allclose(product(found, name), 0.5 * total, atol=2e-6)
        np.testing.assert_allclose(found[f"{name}.S"], 0.5 * values, rtol=1e-5)
        assert found[f"{name}.U"].shape == (shape[0], 5) and found[f"{name}.V"].shape == (shape[1], 5)
    for name in SHAPES.keys() - MATRICES.keys():
        mean = sum(w * delta(weights, s, name) for s, w in zip("abc", (1, -2, 0.5), strict=True)) / 3
        np.testing.assert_allclose(found[f"{name}.delta"], 0.5 * mean, atol=1e-6)
    assert len(found) == 3 * len(MATRICES) + len(SHAPES) - len(MATRICES)


def test_tuning_reads_them_as_components_of_their_base(svd) -> None:
    assert svd("--base", "base", "--sources", "a", "b", "--as", "components", "--top-k", "50%", "-o", "pool") == 0
    base = open_checkpoint("base")
    reader = open_reader(base)
    read = read_components("pool")
    assert read.base_fingerprint == fingerprint(base, reader)
    reader.close()
    assert {name: factors.count for name, factors in read.factors.items()} == {
        "layers.0.up.weight": 4,
        "layers.0.conv.weight": 3,
    }
    assert read.deltas.keys() == SHAPES.keys() - MATRICES.keys()
    metadata = open_checkpoint("pool").metadata
    assert {key: metadata[key] for key in ("pxmerge.kind", "top_k", "pool", "sources")} == {
        "pxmerge.kind": "components",
        "top_k": "50%",
        "pool": "matrix",
        "sources": '["a", "b"]',
    }


@pytest.mark.parametrize("rule", ["matrix", "quota", "normalised"])
@pytest.mark.parametrize("split", ["1", "2", "1+3+2"])
def test_adding_sources_gives_what_a_run_from_scratch_gives(svd, rule: str, split: str) -> None:
    words = ["--as", "components", "--top-k", 5, "--pool", rule, "--scale", 0.7, "--split", split]
    words += ["--set", "merge.rules=[{match: '*up*', params: {split: 3}}]"]
    assert svd("--base", "base", "--sources", *TUNED, *words, "-o", "whole") == 0
    assert svd("--base", "base", "--sources", "a", *words, "-o", "pool") == 0
    assert svd("--into", "pool", "--sources", "b", *words[-2:]) == 0
    assert svd("--into", "pool", "--sources", "c", "d", *words[-2:], "-o", "grown") == 0
    whole, grown = components("whole"), components("grown")
    assert whole.keys() == grown.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(grown[name], tensor, rtol=0, atol=1e-6)
    records = [json.loads(Path(place, "pool.json").read_text()) for place in ("whole", "grown")]
    for record in records:
        for tensor in record["tensors"].values():
            for part in tensor["parts"]:
                part["energies"] = np.round(part["energies"], 4).tolist()
    assert records[0] == records[1]
    assert json.loads(Path("pool/pool.json").read_text())["sources"] == ["a", "b"]


def test_parts_of_a_split_tensor_are_pooled_apart(svd, weights) -> None:
    words = ("--as", "components", "--top-k", 3, "--split", 2, "-o", "pool")
    assert svd("--base", "base", "--sources", "a", "b", *words) == 0
    for name, (rows, _) in MATRICES.items():
        matrices = [delta(weights, source, name).reshape(rows, -1) for source in "ab"]
        halves = [pooled([matrix[part] for matrix in matrices], 3)[0] for part in np.split(np.arange(rows), 2)]
        np.testing.assert_allclose(product(components(), name), np.concatenate(halves), atol=2e-6)


@pytest.mark.parametrize("split", [1, 2])
def test_matrices_of_a_stack_are_pooled_apart(svd, weights, split: int) -> None:
    words = ("--top-k", 2, "--split", split, "--as", "components")
    for source, seed in zip(("base", "a", "b"), (1, 2, 3), strict=True):
        generator = torch.Generator().manual_seed(seed)
        write_checkpoint(Path(source), {"experts.weight": torch.randn(3, 6, 5, generator=generator)})
    assert svd("--base", "base", "--sources", "a", "b", *words, "-o", "whole") == 0
    assert svd("--base", "base", "--sources", "a", *words, "-o", "pool") == 0
    assert svd("--into", "pool", "--sources", "b") == 0
    found = components("whole")
    assert {name: tuple(one.shape) for name, one in found.items()} == {
        "experts.weight.U": (3, 6, 2 * split),
        "experts.weight.S": (3, 2 * split),
        "experts.weight.V": (3, 5, 2 * split),
    }
    stacks = {
        source: load_file(Path(source) / "model.safetensors")["experts.weight"].double()
        for source in ("base", "a", "b")
    }
    for place in range(3):
        matrices = [(stacks[source] - stacks["base"])[place].numpy() for source in "ab"]
        halves = zip(*(np.split(matrix, split) for matrix in matrices), strict=True)
        wanted = np.concatenate([pooled(list(half), 2)[0] for half in halves])
        one = {name: tensor[place] for name, tensor in found.items()}
        np.testing.assert_allclose(product(one, "experts.weight"), wanted, atol=2e-6)
    for name, tensor in components("pool").items():
        torch.testing.assert_close(tensor, found[name], rtol=0, atol=2e-6)


def test_a_lora_of_a_stack_is_refused(refused, weights) -> None:
    generator = torch.Generator().manual_seed(1)
    for source in ("base", "a"):
        write_checkpoint(Path(source), {"experts.weight": torch.randn(3, 6, 5, generator=generator)})
    code, error = refused("--base", "base", "--sources", "a", "--as", "lora")
    assert code == 2 and "experts.weight: an adapter of rank K has no stack of matrices" in error


def test_room_that_is_not_needed_is_filled_with_zeros(svd, weights) -> None:
    """Two equal sources of rank one, and one that is the base itself."""
    change = {name: tensor.clone() for name, tensor in weights["base"].items()}
    change["layers.0.up.weight"] += torch.outer(torch.ones(12), torch.arange(8.0))
    for name in "xy":
        write_checkpoint(name, change)
    words = ("--as", "components", "--top-k", 4, "-o", "pool")
    assert svd("--base", "base", "--sources", "x", "y", "base", *words) == 0
    expected = 2 * np.outer(np.ones(12), np.arange(8))
    np.testing.assert_allclose(product(components(), "layers.0.up.weight"), expected, atol=1e-5)
    assert not components()["layers.0.conv.weight.S"].any()
    assert svd("--into", "pool", "--sources", "a") == 0
    assert svd("--base", "base", "--sources", "x", "y", "base", "a", *words[:-1], "again") == 0
    for name, tensor in components("again").items():
        torch.testing.assert_close(components()[name], tensor, rtol=0, atol=1e-5)


def test_orthogonalised_components_are_the_update_of_the_checkpoint(svd, weights) -> None:
    words = ("--base", "base", "--sources", "a", "b", "c", "--top-k", 4)
    assert svd(*words, "--as", "components", "--orthogonalise", "-o", "pool") == 0
    assert svd(*words, "-o", "model") == 0
    model = load_file("model/model.safetensors")
    for name, shape in MATRICES.items():
        update = (model[name] - weights["base"][name]).reshape(shape)
        np.testing.assert_allclose(product(components(), name), update, atol=2e-6)
        left = components()[f"{name}.U"]
        torch.testing.assert_close(left.T @ left, torch.eye(4), atol=1e-5, rtol=0)


def test_memory_does_not_depend_on_the_number_of_sources(svd, monkeypatch: pytest.MonkeyPatch) -> None:
    most = [0]
    add = ComponentPool.add_components

    def counted(pool: ComponentPool, *given: object) -> None:
        alive = [one for one in gc.get_objects() if type(one) is torch.Tensor and one.numel() == 6 * 4 * 3 * 3]
        most[0] = max(most[0], len({one.untyped_storage().data_ptr() for one in alive}))
        add(pool, *given)

    monkeypatch.setattr(ComponentPool, "add_components", counted)
    gc.collect()
    found = []
    for sources in (("a", "b"), (*TUNED, *TUNED)):
        most[0] = 0
        assert svd("--base", "base", "--sources", *sources, "--as", "components", "-o", f"pool{len(sources)}") == 0
        found.append(most[0])
    assert found[0] == found[1] > 0


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--into", "pool", "--base", "a"), 4, "base is not the one that the pool was taken from; give --base base"),
        (("--into", "pool", "--top-k", 9), 4, "the pool was made with --top-k 4, not 9"),
        (("--into", "pool", "--pool", "quota"), 4, "the pool was made with --pool matrix, not quota"),
        (("--into", "none"), 3, "no such folder of components"),
        (("--into", "base"), 3, "there is no pool.json"),
        (("--into", "straight"), 2, "the pool's vectors were orthogonalised"),
        (("--into", "centred", "--base", "base"), 4, "the pool's base is not known"),
        (("--into", "pool", "--as", "lora"), 2, "--into adds to components"),
        (("--into", "pool", "--report", "r.json"), 2, "--report looks at all sources"),
        (("--as", "components", "--calibrate", "svc"), 2, "--calibrate goes with a checkpoint"),
        (("--as", "components", "--scale", 0), 2, "components of scale 0"),
        (("--as", "components", "--dry-run"), 2, "--dry-run goes with --as checkpoint only"),
        (("--as", "components", "--top-k", 0), 2, "--top-k must be at least 1, not 0"),
        (("--as", "components", "--top-k", "0%"), 2, "must be a whole number of at least 1, or a percentage"),
        (("--as", "components", "--base", "base", "-o", "pool"), 4, "the output folder is not empty"),
        (("--as", "lora", "-o", "adapter"), 4, "an adapter is of one base, and the sources have none"),
        (("--report", "r.png"), 2, "--report names the JSON file"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(svd, refused, words, code: int, says: str) -> None:
    common = ("--as", "components", "--top-k", 4)
    assert svd("--base", "base", "--sources", "a", "b", *common, "-o", "pool") == 0
    if "straight" in words:
        assert svd("--base", "base", "--sources", "a", "b", *common, "--orthogonalise", "-o", "straight") == 0
    if "centred" in words:
        assert svd("--base", "mean", "--sources", "a", "b", *common, "-o", "centred") == 0
    before = Path("pool/components.safetensors").read_bytes()
    sources = ("c",) if "--into" in words else ("a", "b", "c")
    found, error = refused(*words, "--sources", *sources)
    assert (found, says in error) == (code, True), error
    assert Path("pool/components.safetensors").read_bytes() == before


def test_a_source_is_not_added_twice(svd, refused, weights) -> None:
    assert svd("--base", "base", "--sources", "a", "b", "--as", "components", "-o", "pool") == 0
    before = Path("pool/components.safetensors").read_bytes()
    code, error = refused("--into", "pool", "--sources", "c", "b")
    assert code == 2 and "pool: the pool holds b already" in error
    assert Path("pool/components.safetensors").read_bytes() == before


def test_inspect_calls_a_pool_components(svd, capsys: pytest.CaptureFixture[str]) -> None:
    assert svd("--base", "base", "--sources", "a", "--as", "components", "-o", "pool") == 0
    capsys.readouterr()
    assert main(["inspect", "pool", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "components"


def test_a_source_that_is_not_finite_leaves_the_pool_as_it_was(svd, refused, weights) -> None:
    assert svd("--base", "base", "--sources", "a", "b", "--as", "components", "-o", "pool") == 0
    before = [Path("pool", name).read_bytes() for name in ("components.safetensors", "pool.json")]
    bad = dict(weights["c"])
    bad["layers.0.up.weight"] = bad["layers.0.up.weight"].clone()
    bad["layers.0.up.weight"][3, 3] = float("nan")
    write_checkpoint("bad", bad)
    code, error = refused("--into", "pool", "--sources", "bad")
    assert code == 5 and "bad: layers.0.up.weight: the source holds NaN" in error
    assert [Path("pool", name).read_bytes() for name in ("components.safetensors", "pool.json")] == before
    assert svd("--into", "pool", "--sources", "c") == 0


def test_a_report_tells_what_was_pooled(svd, weights) -> None:
    words = ("--base", "base", "--sources", "a", "b", "c", "--top-k", 4)
    assert svd(*words, "-o", "plain") == 0
    assert svd(*words, "--report", "told/report.json", "-o", "model") == 0
    same_weights("model", "plain")
    assert Path("told/report.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(Path("told/report.json").read_text())
    assert report["sources"] == ["a", "b", "c"] and report["settings"]["top_k"] == 4
    assert {row["tensor"] for row in report["tensors"]} == set(MATRICES)
    for row in report["tensors"]:
        matrices = [delta(weights, source, row["tensor"]).reshape(MATRICES[row["tensor"]]) for source in "abc"]
        spectra = [np.linalg.svd(matrix, compute_uv=False) for matrix in matrices]
        kept = sorted(((s, n) for n, values in enumerate(spectra) for s in values), reverse=True)[:4]
        whole = sum(s**2 for s, _ in kept)
        for number, (source, values) in enumerate(zip(row["sources"], spectra, strict=True)):
            np.testing.assert_allclose(source["spectrum"], values[:4], rtol=1e-5)
            share = sum(s**2 for s, n in kept if n == number) / whole
            assert source["pool_share"] == pytest.approx(share, abs=1e-6)
            assert source["energy_kept"] == pytest.approx((values[:4] ** 2).sum() / (values**2).sum(), rel=1e-5)
    assert sum(report["pool_share"]) == pytest.approx(1)


def test_a_pool_says_nothing_of_a_config(weights, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("base", "a"):
        (Path(folder) / "config.json").write_text("{}")
    words = ["svd", "--sources", "a", "b", "--top-k", "5"]
    assert main([*words, "--base", "base", "--as", "components", "-o", "pool"]) == 0
    assert "config" not in capsys.readouterr().err
    assert main([*words, "--base", "mean"]) == 0
    assert "config and side files come from 'a'" in capsys.readouterr().err


def test_the_line_without_options_still_writes_a_checkpoint(svd) -> None:
    assert svd("--sources", "a", "b", "c", "--top-k", 64) == 0
    assert Path("merged/model.safetensors").is_file()
    assert svd("--sources", "a", "b", "c", "--top-k", 64, "--as", "checkpoint", "-o", "same") == 0
    same_weights("same", "merged")


def test_the_result_says_whether_it_was_orthogonalised(svd) -> None:
    assert svd("--base", "mean", "--sources", "a", "b") == 0
    assert "orthogonalise: true" in Path("merged/README.md").read_text()
    assert "orthogonalise: true" in Path("merged/pxmerge.yaml").read_text()
    assert svd("--base", "mean", "--sources", "a", "b", "--as", "components") == 0
    assert json.loads(Path("components/pool.json").read_text())["settings"]["orthogonalise"] is False
