"""Permutations between bases: exact symmetries of real models, and runs with and without data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.cli import main
from mergekit_px.errors import InputError, NonFiniteError, PlanError, PxmergeError, TensorMismatchError, UsageError
from mergekit_px.learn.align.head_counts import head_counts
from mergekit_px.learn.align.layout import find_layout
from mergekit_px.learn.align.matching import random_permutations
from mergekit_px.learn.align.permutations import Layout
from mergekit_px.learn.data import split_rows
from mergekit_px.learn.life import run_learner

ALL = ("heads", "mlp", "residual")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
IMAGES = {**SMALL, "image_size": 8, "patch_size": 4, "num_labels": 3}
TEXTS = {**SMALL, "vocab_size": 30, "max_position_embeddings": 10}

MODELS: dict[str, Callable[[], Any]] = {
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGES)),
    "dinov2": lambda: transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**{name: one for name, one in IMAGES.items() if name != "intermediate_size"})
    ),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TEXTS)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXTS, num_key_value_heads=2)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**TEXTS, num_key_value_heads=2, head_dim=6)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=4, n_positions=10, eos_token_id=0)
    ),
    "phi3": lambda: transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**TEXTS, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    ),
}


def inputs(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    if kind in ("vit", "dinov2"):
        return {"pixel_values": torch.randn(6, 3, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(0, 30, (6, 7), generator=generator)}


@torch.no_grad()
def logits(folder: Path, kind: str) -> Tensor:
    model = type(MODELS[kind]()).from_pretrained(folder, dtype=torch.float32).eval()
    found: Tensor = model(**inputs(kind)).logits
    return found


def saved(like: Path, folder: Path, tensors: dict[str, Tensor]) -> Path:
    shutil.copytree(like, folder)
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def layout_of(folder: Path, permute: tuple[str, ...] = ALL, **told: Any) -> Layout:
    checkpoint = open_checkpoint(folder)
    counts = head_counts(checkpoint, told.get("heads"), told.get("kv_heads"), told.get("positions", "auto"))
    shapes = {name: stored.shape for name, stored in checkpoint.tensors.items() if stored.dtype.arithmetic}
    return find_layout(shapes, counts, permute, told.get("places", ()), checkpoint.label)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder for each kind of model: ``a``, its fine-tune ``tuned`` and ``other``, an unrelated model."""
    root = tmp_path_factory.mktemp("permutation")

    def make(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            torch.manual_seed(3)
            MODELS[kind]().save_pretrained(folder / "a")
            generator = torch.Generator().manual_seed(1)
            start = {
                name: one + 0.3 * torch.randn(one.shape, generator=generator)
                for name, one in weights(folder / "a").items()
            }
            save_file(start, folder / "a" / "model.safetensors", {"format": "pt"})
            for name, scale in (("tuned", 0.1), ("other", 1.0)):
                moved = {key: one + scale * torch.randn(one.shape, generator=generator) for key, one in start.items()}
                saved(folder / "a", folder / name, moved)
        return folder

    return make


def permuted(
    made: Path, folder: Path, *, inside: Any = "joint", seed: int = 7, **told: Any
) -> dict[tuple[str, int], Tensor]:
    """Write ``a`` with its units in a random order; the orders that were used."""
    base = weights(made / "a")
    truth = random_permutations(layout_of(made / "a", **told), base, inside, seed)
    saved(made / "a", folder, truth.transport(base))
    return truth.orders


def options(folder: Path, target: Path, output: Path, **changes: Any) -> dict[str, Any]:
    given = {"base": target, "source_base": folder / "a", "source_model": folder / "tuned", "output": output}
    return {**given, "route": "permutation", "device": "cpu", **changes}


def aligned(settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The report."""
    return run_learner("align", **settings, **more).report.model_dump(mode="json")


# Exact symmetries of real models


@pytest.mark.parametrize(
    ("kind", "by"), [*((kind, "spectrum") for kind in MODELS), ("vit", "product"), ("phi3", "product")]
)
def test_a_permuted_model_is_matched_exactly(made: Callable[[str], Path], kind: str, by: str, tmp_path: Path) -> None:
    """The target computes what the source does, in another order; so does it with the transported task vector."""
    folder = made(kind)
    truth = permuted(folder, tmp_path / "b")
    torch.testing.assert_close(logits(tmp_path / "b", kind), logits(folder / "a", kind), rtol=1e-4, atol=1e-5)
    report = aligned(options(folder, tmp_path / "b", tmp_path / "out", match=by))
    orders = load_file(tmp_path / "out" / "permutations.safetensors")
    assert len(orders) == len(truth) and all(one.dtype == torch.int64 for one in orders.values())
    for (name, axis), order in truth.items():
        assert torch.equal(orders[f"{name}.axis{axis}"], order), name
    assert report["permutations"]["stable"] and report["permutations"]["left_alone"] == {}
    assert report["permutations"]["similarity"]["after"] == pytest.approx(1, abs=1e-6)
    assert report["norm"]["after"] == pytest.approx(report["norm"]["before"], rel=1e-9)
    wanted = logits(folder / "tuned", kind)
    torch.testing.assert_close(logits(tmp_path / "out" / "model", kind), wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - logits(folder / "a", kind)).abs().max() > 1e-2
    moved = weights(tmp_path / "out" / "task_vector")
    for name, before in weights(folder / "tuned").items():
        change = (before - weights(folder / "a")[name]).flatten(1) if before.ndim > 1 else None
        if change is not None:
            values = [torch.linalg.svdvals(one.double()) for one in (change, moved[name].flatten(1))]
            torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=1e-9)
        assert torch.equal(
            moved[name].flatten().sort().values, (before - weights(folder / "a")[name]).flatten().sort().values
        )


@pytest.mark.parametrize("kind", ["vit", "gpt2"])
def test_values_may_have_an_order_of_their_own(made: Callable[[str], Path], kind: str, tmp_path: Path) -> None:
    folder = made(kind)
    permuted(folder, tmp_path / "b", inside="separate")
    torch.testing.assert_close(logits(tmp_path / "b", kind), logits(folder / "a", kind), rtol=1e-4, atol=1e-5)
    found = [
        aligned(options(folder, tmp_path / "b", tmp_path / inside, inside=inside))["permutations"]
        for inside in ("separate", "joint")
    ]
    assert found[0]["similarity"]["after"] == pytest.approx(1, abs=1e-6)
    assert found[1]["similarity"]["after"] < 0.999
    torch.testing.assert_close(
        logits(tmp_path / "separate" / "model", kind), logits(folder / "tuned", kind), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("permute", [("heads",), ("mlp",), ("residual",), ("heads", "mlp")])
def test_parts_of_the_symmetry(made: Callable[[str], Path], permute: tuple[str, ...], tmp_path: Path) -> None:
    folder = made("llama")
    truth = permuted(folder, tmp_path / "b", permute=permute)
    torch.testing.assert_close(logits(tmp_path / "b", "llama"), logits(folder / "a", "llama"), rtol=1e-4, atol=1e-5)
    aligned(options(folder, tmp_path / "b", tmp_path / "out", permute=permute))
    orders = load_file(tmp_path / "out" / "permutations.safetensors")
    assert orders.keys() == {f"{name}.axis{axis}" for name, axis in truth}
    assert all(torch.equal(orders[f"{name}.axis{axis}"], order) for (name, axis), order in truth.items())


@pytest.mark.parametrize("by", ["spectrum", "product"])
def test_equal_bases_give_the_naive_transfer(made: Callable[[str], Path], by: str, tmp_path: Path) -> None:
    folder = made("bert")
    base = weights(folder / "a")
    for name in base:
        if "intermediate" in name or "value" in name:
            base[name][:4] = 0  # units that cannot be told apart stay where they are
    source = saved(folder / "a", tmp_path / "a", base)
    report = aligned(options(folder, source, tmp_path / "out", match=by, source_base=str(source)))
    assert report["permutations"]["moved"] == 0 and report["permutations"]["rounds"] == 1
    for name, tensor in weights(folder / "tuned").items():
        assert torch.equal(weights(tmp_path / "out" / "task_vector")[name], tensor - base[name])


@pytest.mark.parametrize("by", ["spectrum", "product"])
def test_unrelated_models_keep_their_function(made: Callable[[str], Path], by: str, tmp_path: Path) -> None:
    """Whatever is found is a symmetry: the target permuted by it computes the same."""
    folder = made("llama")
    found = aligned(options(folder, folder / "other", tmp_path / "out", match=by))["permutations"]
    assert found["stable"] and 0 < found["moved"] <= 1
    assert found["similarity"]["after"] >= found["similarity"]["before"]
    orders = load_file(tmp_path / "out" / "permutations.safetensors")
    moved = weights(folder / "other")
    for key, order in orders.items():
        name, _, axis = key.rpartition(".axis")
        moved[name] = moved[name].index_select(int(axis), order)
    saved(folder / "a", tmp_path / "b", moved)
    torch.testing.assert_close(logits(tmp_path / "b", "llama"), logits(folder / "other", "llama"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by", ["spectrum", "product"])
def test_heads_of_related_models_stay(made: Callable[[str], Path], by: str, tmp_path: Path) -> None:
    """Noise moves singular values more than heads differ in them; their order is not taken from that alone."""
    folder = made("vit")
    other = weights(folder / "other")
    near = {name: one + 0.3 * (other[name] - one) for name, one in weights(folder / "a").items()}
    target = saved(folder / "a", tmp_path / "b", near)
    report = aligned(options(folder, target, tmp_path / "out", match=by, permute=("heads",)))
    orders = load_file(tmp_path / "out" / "permutations.safetensors")
    heads = [order.reshape(4, 4) // 4 for name, order in orders.items() if name.endswith("query.weight.axis0")]
    assert len(heads) == 2 and all(torch.equal(one, torch.arange(4)[:, None].expand(4, 4)) for one in heads)
    assert report["permutations"]["similarity"]["after"] >= report["permutations"]["similarity"]["before"]


def test_the_same_seed_gives_the_same_bytes(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made("vit")
    for number in range(2):
        aligned(options(folder, folder / "other", tmp_path / str(number), seed=4))
    for file in ("permutations.safetensors", "task_vector/model.safetensors", "model/model.safetensors"):
        assert (tmp_path / "0" / file).read_bytes() == (tmp_path / "1" / file).read_bytes()


def test_an_order_of_the_source_does_not_matter(made: Callable[[str], Path], tmp_path: Path) -> None:
    """A source in another order is the same source: what it brings to the target is the same, exactly."""
    folder = made("vit")
    truth = random_permutations(layout_of(folder / "a"), weights(folder / "a"), "joint", 11)
    other = folder / "other"
    near = {name: one + 0.02 * weights(other)[name] for name, one in weights(folder / "a").items()}
    target = saved(folder / "a", tmp_path / "b", near)
    for name in ("a", "tuned"):
        saved(folder / "a", tmp_path / "shuffled" / name, truth.transport(weights(folder / name)))
    aligned(options(folder, target, tmp_path / "one"))
    aligned(options(tmp_path / "shuffled", target, tmp_path / "two"))
    one, two = (weights(tmp_path / name / "task_vector") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


# What cannot be placed


def test_query_key_value_by_head(made: Callable[[str], Path], tmp_path: Path) -> None:
    """A name that does not tell the order inside has to be explained."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(**TEXTS, rotary_pct=0.5)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "a")
    with pytest.raises(PlanError, match=r"query_key_value\.weight.*--place"):
        layout_of(tmp_path / "a")
    places = (("qkv-by-head", "query_key_value"),)
    base = weights(tmp_path / "a")
    truth = random_permutations(layout_of(tmp_path / "a", places=places), base, "joint", 2)
    saved(tmp_path / "a", tmp_path / "b", truth.transport(base))
    tokens = inputs("llama")
    with torch.no_grad():
        before, after = (
            transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path / name).eval()(**tokens).logits for name in "ab"
        )
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-6)
    assert truth.moved() > 0.5


def test_rotary_positions_hold_queries_and_keys(made: Callable[[str], Path]) -> None:
    base = weights(made("llama") / "a")
    layout = layout_of(made("llama") / "a")
    assert all(one.fixed and (one.groups, one.queries) == (2, 2) for one in layout.attention)
    orders = random_permutations(layout, base, "joint", 0).orders
    keys = orders["model.layers.0.self_attn.k_proj.weight", 0].reshape(2, 4)
    assert torch.equal(keys % 4, torch.arange(4).repeat(2, 1))
    assert not torch.equal(orders["model.layers.0.self_attn.v_proj.weight", 0].reshape(2, 4) % 4, keys % 4)


# Runs


def bad(folder: Path, tmp_path: Path) -> Iterator[tuple[dict[str, Any], type[PxmergeError], str]]:
    wide = tmp_path / "wide"
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**TEXTS, "hidden_size": 32}, num_key_value_heads=2)
    ).save_pretrained(wide)
    more = tmp_path / "more"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXTS, num_key_value_heads=4)).save_pretrained(more)
    holed = {name: one.clone() for name, one in weights(folder / "a").items()}
    holed["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    saved(folder / "a", tmp_path / "nan", holed)
    bare = str(folder / "a" / "model.safetensors")
    yield {"base": str(wide)}, TensorMismatchError, r"\.weight is \[16, .* and \[32, .*--route theseus"
    yield {"base": str(more)}, TensorMismatchError, "2 key and value heads.*--permute mlp residual"
    yield {"base": str(tmp_path / "nan")}, NonFiniteError, "up_proj.weight holds a NaN"
    yield {"base": bare}, UsageError, "number of heads is told by no config.json; give it with --heads"
    yield {"base": bare, "heads": 4}, UsageError, "--positions additive"
    yield {"heads": 3}, PlanError, r"q_proj\.weight has 16 channels, which do not fit 3 heads"
    yield {"heads": 4, "kv_heads": 3}, UsageError, "cannot share 3"
    yield {"kv_heads": 4}, PlanError, r"k_proj\.weight has 8 channels"
    yield {"permute": ("head",)}, UsageError, "permute must be 'heads', 'mlp' or 'residual', not head"
    yield {"permute": ()}, UsageError, "nothing is to be permuted"
    yield {"places": ("quer=x",)}, UsageError, "no role 'quer'"
    yield {"places": ("reader=a..b",)}, UsageError, "no pattern"
    yield {"places": ("writer=lm_head",)}, PlanError, r"nothing tells what lm_head\.weight \[30, 16\]"
    yield {"source_base": None}, UsageError, "source base is needed"
    yield {"route": "orthogonal"}, UsageError, "needs labelled examples"
    yield {"test": str(folder / "a" / "config.json")}, UsageError, "test data goes with --data"


def test_what_cannot_be_matched_is_refused(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made("llama")
    tried = 0
    for changes, error, message in bad(folder, tmp_path):
        with pytest.raises(error, match=message):
            aligned(options(folder, folder / "other", tmp_path / "out", **changes))
        tried += 1
    assert tried == 16 and not (tmp_path / "out").exists()


def test_scipy_is_asked_for_by_name(made: Callable[[str], Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="scipy, which is not installed"):
        aligned(options(made("llama"), made("llama") / "other", tmp_path / "out"))


def test_other_classes_are_left_out(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made("vit")
    tensors = weights(folder / "other")
    tensors["classifier.weight"], tensors["classifier.bias"] = torch.zeros(5, 16), torch.zeros(5)
    target = saved(folder / "a", tmp_path / "b", tensors)
    report = aligned(options(folder, target, tmp_path / "out"))
    assert report["left_out"] == ["classifier.bias", "classifier.weight"]
    assert weights(tmp_path / "out" / "model")["classifier.weight"].shape == (5, 16)


def test_permutations_are_used_again(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made("vit")
    permuted(folder, tmp_path / "b")
    aligned(options(folder, tmp_path / "b", tmp_path / "out"))
    second = {name: one + 0.1 * weights(folder / "other")[name] for name, one in weights(folder / "a").items()}
    saved(folder / "a", tmp_path / "second", second)
    again = options(folder, tmp_path / "b", tmp_path / "again", route="orthogonal", maps=str(tmp_path / "out"))
    report = aligned(again | {"source_model": str(tmp_path / "second")})
    assert report["reused"] == str(tmp_path / "out") and "random permutation" not in report["not_scored"]
    moved = logits(tmp_path / "again" / "model", "vit")
    torch.testing.assert_close(moved, logits(tmp_path / "second", "vit"), rtol=1e-4, atol=1e-5)
    orders = (tmp_path / "out" / "permutations.safetensors", tmp_path / "again" / "permutations.safetensors")
    assert orders[0].read_bytes() == orders[1].read_bytes()
    for changes, what in (
        ({"base": str(folder / "other")}, "target"),
        ({"source_base": str(folder / "other")}, "source"),
    ):
        with pytest.raises(PlanError, match=f"made for another {what} base"):
            aligned(again | {"output": tmp_path / "no", **changes})
    first = next(iter(load_file(orders[0])))
    for array, message in (
        (torch.zeros(16, dtype=torch.int64), "is no permutation"),
        (torch.arange(9), "does not fit"),
    ):
        save_file({first: array}, tmp_path / "broken.safetensors")
        with pytest.raises((InputError, PlanError), match=message):
            aligned(again | {"output": tmp_path / "no", "maps": str(tmp_path / "broken.safetensors")})
    with pytest.raises(InputError, match="is no file that"):
        aligned(again | {"output": tmp_path / "no", "maps": str(folder / "a" / "model.safetensors")})
    with pytest.raises(InputError, match="is there"):
        aligned(again | {"output": tmp_path / "no", "maps": str(folder / "a")})


def few(folder: Path) -> Path:
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = generator.normal(size=(60, 3, 8, 8)) + labels[:, None, None, None]
    np.savez(folder / "few.npz", pixel_values=images.astype(np.float32), labels=labels)
    return folder / "few.npz"


def test_with_data_all_controls_are_scored(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made("vit")
    permuted(folder, tmp_path / "b")
    changes: dict[str, Any] = {"data": str(few(tmp_path)), "steps": 2, "evaluate_every": 1}
    report = aligned(options(folder, tmp_path / "b", tmp_path / "out", **changes))
    assert list(report["test"]) == [
        "zero-shot", "naive", "aligned", "sham", "few-shot fine-tune", "fine-tune from naive", "random permutation"
    ]  # fmt: skip
    rows = split_rows(60, {"validation": 0.2, "test": 0.3}, 0, "data")["test"]
    module = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out" / "model").eval()
    with np.load(tmp_path / "few.npz") as arrays, torch.no_grad():
        logits = module(pixel_values=torch.from_numpy(arrays["pixel_values"])[rows]).logits
        right = logits.argmax(-1) == torch.from_numpy(arrays["labels"])[rows]
    assert report["test"]["aligned"] == pytest.approx(100 * float(right.double().mean()))
    assert report["not_scored"] == {} and len(report["scales"]) == 9
    assert report["permutations"]["function_change"] < 1e-4
    aligned(options(folder, tmp_path / "b", tmp_path / "free"))
    for file in ("permutations.safetensors", "task_vector/model.safetensors", "model/model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "free" / file).read_bytes()
    with pytest.raises(PlanError, match="not built as its names tell"):
        aligned(options(folder, folder / "other", tmp_path / "wrong", heads=2, **changes))


def test_the_command_without_data(
    made: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made("llama")
    words = ["align", "--source-base", folder / "a", "--source-model", folder / "tuned", "--base"]
    words += [folder / "other", "--route", "permutation", "--permute", "heads", "mlp", "-o", tmp_path / "out"]
    assert main([str(word) for word in words]) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == str(tmp_path / "out")
    assert "cosine of the weights" in shown.err and "not scored, since there is no --data: zero-shot" in shown.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["permute"] == ["heads", "mlp"] and report["test"] == {}
    again = [
        "align",
        "--source-base",
        folder / "a",
        "--source-model",
        folder / "tuned",
        "--base",
        folder / "other",
    ]
    again += ["--maps", tmp_path / "out", "-o", tmp_path / "again", "--json"]
    assert main([str(word) for word in again]) == 0
    assert json.loads(capsys.readouterr().out.split(str(tmp_path / "again") + "\n")[0])["reused"] == str(
        tmp_path / "out"
    )
    one, two = (weights(tmp_path / name / "model") for name in ("out", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert main([*map(str, again[:-3]), "-o", str(tmp_path / "bad"), "--route", "permutation", "--place", "query"]) == 2
    assert "--place ROLE=NAME" in capsys.readouterr().err
