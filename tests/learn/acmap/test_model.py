"""Features that a model computes, with each merged adapter put into it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mergekit_px.adapters.acmap import AcmapState
from mergekit_px.adapters.acmap_stored import StoredState
from mergekit_px.cli import main
from mergekit_px.errors import InputError, NonFiniteError, PxmergeError, TensorMismatchError, UsageError
from mergekit_px.learn.acmap.backbone import Backbone, ModelOptions
from mergekit_px.learn.acmap.classify import ClassifyOptions, classify
from mergekit_px.learn.acmap.mapping import MapOptions, map_task
from mergekit_px.learn.acmap.prototypes import Prototypes
from mergekit_px.learn.acmap.readout import Readout


def options(problem, **given) -> ModelOptions:
    standard = {"base": str(problem.folder / "base"), "factory": problem.model, "allow_code": True, "batch": 4}
    return ModelOptions(**{**standard, "device": "cpu", **given})


def map_data(problem, task: int, **given):
    model = given.pop("model", None) or options(problem)
    return map_task(MapOptions(state=problem.state, data=problem.write_data(task), model=model, **given))


def table_of(state: Path) -> Prototypes:
    return Prototypes.of(StoredState(state))


def test_features_of_a_model_are_those_computed_by_hand(problem) -> None:
    for task in range(1, 6):
        map_data(problem, task, concatenate=True)
    table = table_of(problem.state)
    originals, mapped = problem.by_hand(5)
    np.testing.assert_allclose(table.vectors.numpy(), np.stack([originals[c] for c in sorted(originals)]), atol=2e-6)
    np.testing.assert_allclose(table.mapped().numpy(), np.stack([mapped[c] for c in sorted(mapped)]), atol=4e-6)
    plain = problem.features(1, 0)[problem.labels[0] == 1].mean(axis=0)
    np.testing.assert_allclose(table.plain[1].numpy(), plain, atol=2e-6)


def test_data_and_features_classify_alike(problem) -> None:
    for task in range(1, 4):
        map_data(problem, task)
    by_model = classify(ClassifyOptions(problem.state, data=problem.write_data(2), model=options(problem)))
    path = problem.folder / "same.npz"
    np.savez(path, features=problem.features(2, 3), labels=problem.labels[1])
    by_features = classify(ClassifyOptions(problem.state, features=str(path)))
    assert torch.equal(by_model.classes, by_features.classes)
    assert by_model.report["accuracy"] == by_features.report["accuracy"]


def test_the_batch_size_hardly_matters(problem) -> None:
    found = []
    for batch in (1, 100):
        problem.merge()
        for task in (1, 2):
            map_data(problem, task, model=options(problem, batch=batch))
        found.append(table_of(problem.state).mapped())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_prototypes(problem) -> None:
    found = []
    for device in ("cpu", "cuda"):
        problem.merge()
        for task in (1, 2):
            map_data(problem, task, model=options(problem, device=device), concatenate=True)
        found.append(table_of(problem.state).mapped())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-4)


def test_one_pass_for_each_merged_adapter_and_one_adapter_at_a_time(problem, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    read: list[int] = []
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    real = StoredState.adapter

    def counted(self: StoredState, number: int) -> dict[str, torch.Tensor]:
        nonlocal most
        found = real(self, number)
        read.append(number)
        alive.extend(weakref.ref(tensor) for tensor in found.values())
        most = max(most, sum(one() is not None for one in alive) // len(found))
        return found

    monkeypatch.setattr(StoredState, "adapter", counted)
    for task in (1, 2, 3, 4):
        read.clear()
        map_data(problem, task)
        # The first one is read to see whether adapters fit the model.
        assert read[1:] == ([task, *range(1, task)] if task <= 3 else [3])
    assert most == 1


def test_a_function_that_fills_the_model_needs_no_base(problem) -> None:
    model = options(problem, base=None)
    for task in (1, 2):
        map_data(problem, task, model=model)
    with pytest.raises(InputError, match="made with another model"):
        map_data(problem, 3)
    map_data(problem, 3, model=options(problem, allow_base_mismatch=True))


def test_features_read_in_another_way_cannot_be_compared(problem) -> None:
    map_data(problem, 1)
    with pytest.raises(InputError, match="made with the default feature"):
        map_data(problem, 2, model=options(problem, feature="body"))
    with pytest.raises(InputError, match="made with the default feature"):
        classify(ClassifyOptions(problem.state, data=problem.write_data(1), model=options(problem, feature="body")))


def test_an_interrupted_mapping_takes_up_its_passes(problem, monkeypatch: pytest.MonkeyPatch) -> None:
    for task in (1, 2):
        map_data(problem, task)
    start = problem.state.read_bytes()
    map_data(problem, 3)
    expected = problem.state.read_bytes()
    problem.state.write_bytes(start)
    passes: list[str] = []
    real = Backbone.features

    def stopping(self, batches, tensors, where):
        passes.append("pass")
        if len(passes) == 3:
            raise KeyboardInterrupt
        return real(self, batches, tensors, where)

    monkeypatch.setattr(Backbone, "features", stopping)
    with pytest.raises(KeyboardInterrupt):
        map_data(problem, 3)
    assert problem.state.read_bytes() == start
    pending = problem.state.with_name("state.pending")
    assert len(load_file(pending)) == 2
    map_data(problem, 3, resume=True)
    assert len(passes) == 4
    assert problem.state.read_bytes() == expected
    assert not pending.exists()


def test_passes_of_another_mapping_are_not_taken_up(problem, monkeypatch: pytest.MonkeyPatch) -> None:
    map_data(problem, 1)
    start = problem.state.read_bytes()
    map_data(problem, 2)
    expected = problem.state.read_bytes()
    problem.state.write_bytes(start)
    save_file({"2": torch.zeros(3, 8, dtype=torch.float64)}, problem.state.with_name("state.pending"))
    map_data(problem, 2, resume=True)
    assert problem.state.read_bytes() == expected


def test_a_state_without_its_past(problem) -> None:
    problem.merge(keep_past=False)
    with pytest.raises(InputError, match="--no-past"):
        map_data(problem, 1)
    for task in (1, 2, 3):
        map_task(MapOptions(state=problem.state, features=problem.write_features(task)))
    found = classify(ClassifyOptions(problem.state, data=problem.write_data(1), model=options(problem)))
    assert found.report["adapter"] == 3


def test_refusals_of_models(problem) -> None:
    short = problem.folder / "short"
    short.mkdir()
    save_file({"body.weight": torch.ones(8, 6)}, short / "model.safetensors")
    wide = problem.folder / "wide"
    wide.mkdir()
    save_file({"body.weight": torch.ones(9, 6), "body.bias": torch.ones(8)}, wide / "model.safetensors")
    surplus = problem.folder / "surplus"
    surplus.mkdir()
    save_file(
        {"body.weight": torch.ones(8, 6), "body.bias": torch.ones(8), "x": torch.ones(1)}, surplus / "model.safetensors"
    )
    nan = problem.folder / "nan"
    nan.mkdir()
    save_file({"body.weight": torch.full((8, 6), torch.nan), "body.bias": torch.ones(8)}, nan / "model.safetensors")
    cases: list[tuple[ModelOptions, type[PxmergeError], str]] = [
        (options(problem, base=None, factory=None), UsageError, "give --base, --model, or both"),
        (options(problem, allow_code=False), UsageError, "--allow-code"),
        (options(problem, factory=f"{problem.folder / 'tiny.py'}:broken"), UsageError, "half_of_it"),
        (options(problem, factory=None), InputError, "no config.json"),
        (options(problem, base=str(short)), TensorMismatchError, "lacks body.bias"),
        (options(problem, base=str(wide)), TensorMismatchError, r"body.weight is \[9, 6\] there and \[8, 6\]"),
        (options(problem, base=str(surplus)), TensorMismatchError, "the model has no x"),
        (options(problem, base=str(nan)), NonFiniteError, "NaN"),
        (options(problem, feature="adapter.sideways"), UsageError, "neither a module of the model nor in its output"),
    ]
    before = problem.state.read_bytes()
    for model, kind, message in cases:
        with pytest.raises(kind, match=message):
            map_data(problem, 1, model=model)
    assert problem.state.read_bytes() == before


def test_adapters_of_another_family_are_refused(problem) -> None:
    state = AcmapState()
    state.add({"blocks.0.adapter.down": torch.ones(2, 2)}, "other")
    state.save(problem.state)
    with pytest.raises(TensorMismatchError, match=r"it lacks adapter\.down\.weight"):
        map_data(problem, 1)
    with pytest.raises(TensorMismatchError, match=r"the model has no blocks\.0\.adapter\.down, which the adapters"):
        map_data(problem, 1, model=options(problem, base=None))
    state = AcmapState()
    state.add({"adapter.up.bias": torch.ones(9)}, "wide")
    state.save(problem.state)
    with pytest.raises(
        TensorMismatchError, match=r"adapter.up.bias is \[9\] in the state's adapters, \[8\] in the model"
    ):
        map_data(problem, 1, model=options(problem, base=None))


@pytest.mark.parametrize(
    ("arrays", "kind", "message"),
    [
        ({"y": np.ones((4, 6), dtype=np.float32)}, InputError, "it needs x"),
        ({"x": np.ones((4, 5), dtype=np.float32)}, InputError, r"cannot take the arrays \(x \[5\] for an example\)"),
        ({"x": np.ones((3, 6), dtype=np.float32)}, InputError, "a row for each of 4 examples"),
        ({"x": np.full((4, 6), np.nan, dtype=np.float32)}, InputError, "x holds a NaN"),
        ({"x": np.full((4, 6), 3e38, dtype=np.float32)}, NonFiniteError, "NaN or infinite"),
        ({}, InputError, "no inputs"),
    ],
)
def test_data_that_do_not_fit(problem, arrays, kind, message: str) -> None:
    path = problem.folder / "bad.npz"
    np.savez(path, labels=np.array([0, 0, 1, 1]), **arrays)
    with pytest.raises(kind, match=message):
        map_task(MapOptions(state=problem.state, data=str(path), model=options(problem)))


# --- which output is read ----------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3, bias=False)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        tokens = self.inner(x)
        return {"last_hidden_state": tokens, "logits": tokens.sum((1, 2))[:, None], "map": tokens[..., None]}


@pytest.mark.parametrize(
    ("name", "pool", "masked", "expected"),
    [
        (None, "first", False, lambda t: t[:, 0]),
        (None, "last", False, lambda t: t[:, 3]),
        (None, "mean", False, lambda t: t.mean(1)),
        (None, "first", True, lambda t: torch.stack([t[0, 1], t[1, 0]])),
        (None, "last", True, lambda t: torch.stack([t[0, 3], t[1, 1]])),
        (None, "mean", True, lambda t: torch.stack([t[0, 1:].mean(0), t[1, :2].mean(0)])),
        ("inner", "mean", False, lambda t: t.mean(1)),
        ("logits", "first", False, lambda t: t.sum((1, 2))[:, None]),
        ("map", "first", False, lambda t: t.mean(2, keepdim=True).squeeze(2)),
    ],
)
def test_what_is_read(name, pool, masked: bool, expected) -> None:
    module = Encoder()
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    batch = {"x": x}
    if masked:
        batch["attention_mask"] = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    readout = Readout(module, name, pool)
    with torch.no_grad(), readout.listening():
        found = readout.read(module(**batch), batch, "data")
        torch.testing.assert_close(found, expected(module.inner(x)))


def test_outputs_that_hold_no_feature() -> None:
    batch = {"x": torch.ones(2, 4, 3)}
    with pytest.raises(InputError, match=r"no last_hidden_state and no pooler_output; name what is read.*logits"):
        Readout(Encoder(), None, "first").read({"logits": torch.ones(2, 3)}, batch, "data")
    with pytest.raises(UsageError, match=r"nothing is neither a module.*the output has logits"):
        Readout(Encoder(), "nothing", "first").read({"logits": torch.ones(2, 3)}, batch, "data")
    with pytest.raises(InputError, match=r"the feature is a tensor \[2\], for 2 examples"):
        Readout(Encoder(), None, "first").read(torch.ones(2), batch, "data")
    readout = Readout(Encoder(), "inner", "first")
    with readout.listening(), pytest.raises(UsageError, match="does not use the module inner"):
        readout.read(torch.ones(2, 3), batch, "data")


# --- models and adapters as they come ----------------------------------------------------------------------


def tiny_vit(folder: Path) -> nn.Module:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(folder)
    return model


def images(folder: Path, task: int) -> str:
    random = np.random.default_rng(task)
    path = folder / f"images{task}.npz"
    labels = np.arange(10) % 2 + 2 * task
    np.savez(path, pixel_values=random.normal(size=(10, 3, 8, 8)).astype(np.float32), labels=labels)
    return str(path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_lora_on_a_transformers_model_gives_the_features_of_peft(tmp_path: Path) -> None:
    import peft
    import transformers

    tiny_vit(tmp_path / "vit")
    settings = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj", "query", "value"])
    for task in (1, 2):
        torch.manual_seed(task)
        wrapped = peft.get_peft_model(
            transformers.ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False), settings
        )
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        wrapped.save_pretrained(tmp_path / f"lora{task}")
    state = tmp_path / "state"
    words = ["acmap", "merge", *(str(tmp_path / name) for name in ("lora1", "lora2")), "--state", str(state)]
    assert main([*words, "-o", str(tmp_path / "m"), "-q"]) == 0
    model = ModelOptions(base=str(tmp_path / "vit"), device="cpu", batch=3)
    for task in (1, 2):
        map_task(MapOptions(state=state, data=images(tmp_path, task), model=model))
    loaded = transformers.ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False)
    merged = peft.PeftModel.from_pretrained(loaded, str(tmp_path / "m")).eval()
    with torch.no_grad(), np.load(images(tmp_path, 2)) as archive:
        features = merged(pixel_values=torch.from_numpy(archive["pixel_values"])).last_hidden_state[:, 0]
        labels = torch.from_numpy(archive["labels"])
    table = table_of(state)
    for c in (4, 5):
        expected = features[labels == c].double().mean(0)
        torch.testing.assert_close(table.vectors[table.classes == c][0], expected, rtol=0, atol=1e-5)
    assert float(table.shifts[0].norm()) > 0.01
    kept = json.loads(json.dumps(StoredState(state).state.config))
    assert kept["peft_type"] == "LORA" and kept["r"] == 2


def test_adapters_that_are_tensors_of_a_transformers_model(tmp_path: Path) -> None:
    module = tiny_vit(tmp_path / "vit")
    names = [name for name in load_file(tmp_path / "vit" / "model.safetensors") if "layernorm" in name]
    state = AcmapState()
    tensors = load_file(tmp_path / "vit" / "model.safetensors")
    random = torch.Generator().manual_seed(0)
    adapters = [
        {n: tensors[n] + 0.3 * torch.randn(tensors[n].shape, generator=random) for n in names} for _ in range(2)
    ]
    for number, adapter in enumerate(adapters):
        state.add(adapter, f"norms{number}")
    state.save(tmp_path / "state")
    model = ModelOptions(base=str(tmp_path / "vit"), device="cpu", feature="last_hidden_state", pool="mean")
    for task in (1, 2):
        map_task(MapOptions(state=tmp_path / "state", data=images(tmp_path, task), model=model))
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    (tuned / "config.json").write_bytes((tmp_path / "vit" / "config.json").read_bytes())
    save_file(tensors | adapters[0], tuned / "model.safetensors", {"format": "pt"})
    module = type(module).from_pretrained(tuned).eval()
    with torch.no_grad(), np.load(images(tmp_path, 1)) as archive:
        found = module(pixel_values=torch.from_numpy(archive["pixel_values"])).last_hidden_state.mean(1)
        expected = found[torch.from_numpy(archive["labels"]) == 2].double().mean(0)
    torch.testing.assert_close(table_of(tmp_path / "state").vectors[0], expected, rtol=0, atol=1e-5)


def test_a_peft_adapter_needs_a_base(problem) -> None:
    state = AcmapState(config={"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    state.add(
        {
            "base_model.model.body.lora_A.weight": torch.ones(2, 6),
            "base_model.model.body.lora_B.weight": torch.ones(8, 2),
        },
        "a",
    )
    state.save(problem.state)
    with pytest.raises(UsageError, match="give its checkpoint by --base"):
        map_data(problem, 1, model=options(problem, base=None))
    plain = problem.folder / "plain.py"
    plain.write_text(
        "from torch import nn\n\n\nclass P(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.body = nn.Linear(6, 8)\n\n    def forward(self, x):\n        return self.body(x)\n"
    )
    map_data(problem, 1, model=replace(options(problem), factory=f"{plain}:P"))
    base = load_file(problem.folder / "base" / "model.safetensors")
    weight = base["body.weight"].double().numpy() + 2
    features = problem.inputs[0] @ weight.T + base["body.bias"].double().numpy()
    expected = features[problem.labels[0] == 0].mean(axis=0)
    np.testing.assert_allclose(table_of(problem.state).vectors[0].numpy(), expected, atol=1e-5)


def test_memory_is_planned_from_headers(problem, capsys) -> None:
    data = problem.write_data(1)
    words = ["acmap", "map", "--state", str(problem.state), "--device", "cpu", "--allow-code"]
    model = ["--data", str(data), "--model", problem.model]
    assert main([*words, *model, "--memory", "1GB"]) == 2
    assert "give its checkpoint by --base, or leave out --memory" in capsys.readouterr().err
    model += ["--base", str(problem.folder / "base")]
    assert main([*words, *model, "--memory", "100MB"]) == 4
    assert "bytes a parameter (weights 4.0, one layer " in capsys.readouterr().err
    assert not StoredState(problem.state).state.count or not table_of(problem.state).records
    assert main([*words, *model, "--memory", "1GB"]) == 0
    assert "memory: 500 MB besides activations, " in capsys.readouterr().err
