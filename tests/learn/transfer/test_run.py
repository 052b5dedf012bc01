from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from mergekit_px.learn.transfer.arm import Arm, Trial
from mergekit_px.learn.transfer.load import load_transfer_plan
from mergekit_px.learn.transfer.run import trials_of
from mergekit_px.learn.transfer.side import Side


def trial_of(place) -> Trial:
    """The single transfer of a place's plan, ready to run."""
    Path("plan.yaml").write_text(json.dumps(place.plan))
    loaded = load_transfer_plan("plan.yaml")
    return trials_of(loaded, {}, "identity", torch.device("cpu"), allow_code=True)[0]


# What comes out


def test_the_output_is_the_model_and_nothing_else(place, files) -> None:
    folder = place.checkpoint("small", "kernels", torch.bfloat16)
    place.plan["models"]["kernels"]["weights"] = str(folder)
    place.plan["models"]["wide"]["weights"] = str(place.checkpoint("big", "wide"))
    outcome = place.run("--json")
    before, after = place.tensors("small"), place.tensors("out/transfer/target")
    assert {name: (one.shape, one.dtype) for name, one in after.items()} == {
        name: (one.shape, one.dtype) for name, one in before.items()
    }
    assert not torch.equal(after["deep.weight"], before["deep.weight"])
    assert after["norm.num_batches_tracked"] == 12
    written = {"model.safetensors", "config.json", "preprocessor_config.json", "pxmerge.lock.json"}
    assert set(files("out/transfer/target")) == written
    assert Path("out/transfer/target/config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert set(files("out")) == {
        "plan.yaml",
        "pxmerge.lock.json",
        "report.json",
        "report.md",
        *(f"transfer/target/{name}" for name in files("out/transfer/target")),
        *(f"transfer/source/{name}" for name in files("out/transfer/source")),
    }
    report = place.report()
    assert json.loads(outcome.stdout) == {"output": "out", **report}
    assert report["inputs"]["kernels"][0]["reference"] == str(folder)
    assert [one["reference"] for one in report["inputs"]["wide: files"]] == ["nets.py:wide", "short.npz"]


def test_the_report_compares_over_seeds(place) -> None:
    place.plan["seeds"] = 2
    place.transfer["controls"] = ["none", "sham", "dense"]
    place.run("--seed", 7)
    report = place.report()
    assert report["seeds"] == [7, 8]
    [comparison] = report["transfers"]["transfer"]["comparisons"]
    assert (comparison["model"], comparison["metric"], comparison["better"]) == ("kernels", "accuracy", "max")
    assert set(comparison["arms"]) == {"transfer", "none", "sham", "dense"}
    ours, theirs = (np.array(comparison["arms"][arm]["values"]) for arm in ("transfer", "sham"))
    difference = comparison["transfer_minus"]["sham"]
    assert difference["values"] == list(ours - theirs)
    assert difference["mean"] == pytest.approx((ours - theirs).mean())
    assert difference["sd"] == pytest.approx((ours - theirs).std(ddof=1))
    table = Path("out/report.md").read_text()
    assert (
        "sham source" in table and "Experimental." in table and "With 2 seeds, |t| below 12.71 shows nothing." in table
    )


@pytest.mark.parametrize(("cycle", "stop_at"), [(3, 0.7), (1, 1.0), (5, 0.3), (100, 0.7), (4, 1 / 3)])
def test_the_number_of_transfers(place, cycle: int, stop_at: float) -> None:
    place.transfer.update(cycle=cycle, stop_at=stop_at, controls=[])
    place.run()
    expected = math.ceil(Fraction(str(stop_at)) * 12 / cycle)
    assert place.report()["transfers"]["transfer"]["transfers"] == expected


def test_equal_seeds_give_equal_bytes_and_others_do_not(place, files) -> None:
    place.transfer["controls"] = ["none", "sham"]
    place.run("-o", "a")
    place.run("-o", "b")
    place.run("-o", "c", "--seed", 1)
    a, b, c = files("a"), files("b"), files("c")
    assert a == b
    assert a["transfer/target/model.safetensors"] != c["transfer/target/model.safetensors"]


# What a transfer is


def test_with_zero_maps_nothing_differs_until_the_adapter_has_learnt(place) -> None:
    place.transfer["adapter"]["init"] = "zero"
    trial = trial_of(place)
    arms = {kind: Arm(trial, kind, 0) for kind in ("transfer", "none")}

    def weights() -> list[list[torch.Tensor]]:
        return [[one.clone() for one in arm.target.model.tensors().values()] for arm in arms.values()]

    for step in range(4):
        for arm in arms.values():
            arm._step(step)
        ours, theirs = weights()
        same = all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
        assert same == (step < 3)  # the second transfer is at step 3


def test_the_norm_is_kept_at_every_transfer(place) -> None:
    place.transfer["adapter"].update(gate=2.0, lr=0.1)
    arm = Arm(trial_of(place), "transfer", 0)
    assert arm.exchange is not None
    plain = arm.exchange.transfer
    ratios = []

    def measured() -> None:
        factors = arm.exchange.links[0].receiver
        before, address = factors.address.norm().item(), factors.address.detach().clone()
        plain()
        ratios.append(factors.address.norm().item() / before)
        assert not torch.allclose(factors.address, address)

    arm.exchange.transfer = measured
    for step in range(9):
        arm._step(step)
    assert len(ratios) == 3
    assert ratios == pytest.approx([1.0] * 3, abs=1e-6)


def test_a_frozen_source_is_only_read(place, files, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place.checkpoint("big", "wide")
    place.plan["models"]["wide"] = {"weights": str(folder)}
    place.transfer.update(mode="frozen", controls=["none", "sham"])
    before = files(folder)
    place.run()
    assert files(folder) == before
    assert not Path("out/transfer/source").exists()
    assert list(place.report()["transfers"]["transfer"]["comparisons"][0]["arms"]) == ["transfer", "none", "sham"]


@pytest.mark.parametrize("rank", [[3, 4], "full"])
@pytest.mark.parametrize("phi_grad", ["delta", "exact"])
def test_mutual_transfer_has_no_first_and_second(place, rank: object, phi_grad: str) -> None:
    place.transfer.update(mode="mutual", phi_grad=phi_grad, controls=["none", "sham"])
    place.transfer["pairs"][0]["rank"] = rank
    place.run("-o", "a")
    ours = place.report("a")["transfers"]["transfer"]["comparisons"]
    place.transfer.update(source="kernels", target="wide")
    turned = rank if rank == "full" else rank[::-1]
    place.transfer["pairs"] = [{"target": "first.weight", "source": "deep.weight", "rank": turned}]
    place.run("-o", "b")
    theirs = place.report("b")["transfers"]["transfer"]["comparisons"]
    for role, other in [("target", "source"), ("source", "target")]:
        one, two = (
            Path(path, "model.safetensors").read_bytes() for path in (f"a/transfer/{role}", f"b/transfer/{other}")
        )
        assert one == two
    assert [{**one, "role": None} for one in ours] == [{**one, "role": None} for one in theirs[::-1]]
    assert [one["model"] for one in ours] == ["kernels", "wide"]


def test_self_transfer_is_between_tensors_of_one_model(place) -> None:
    place.plan["models"].pop("wide")
    place.plan["transfer"] = {
        **place.transfer,
        "mode": "self",
        "preset": "self",
        "pairs": [
            {"target": "deep.weight", "source": "head.weight", "rank": 2},
            {"target": "conv.weight", "source": "deep.weight", "rank": 2},
        ],
    }
    place.transfer.pop("source")
    place.run()
    report = place.report()["transfers"]["transfer"]
    assert report["settings"]["adapter"]["heads"] == 2
    assert report["models"]["kernels"]["optimizer"]["lr"] == 0.01
    assert not Path("out/transfer/source").exists()


def test_the_source_of_a_joint_transfer_learns_too(place) -> None:
    trial = trial_of(place)
    arm = Arm(trial, "transfer", 0)
    assert arm.source is not None
    before = {name: tensor.clone() for name, tensor in arm.source.model.tensors().items()}
    arm._step(0)
    after = arm.source.model.tensors()
    assert not torch.equal(before["first.weight"], after["first.weight"])
    assert arm.source.place == (0, 1)
    for step in range(1, 4):
        arm._step(step)
    assert (arm.source.place, arm.target.place) == ((1, 2), (0, 4))


def test_the_baseline_adapter_and_full_ranks(place) -> None:
    place.transfer["adapter"]["kind"] = "mlp"
    place.transfer["pairs"][0]["rank"] = "full"
    place.transfer["residual"] = False
    place.run()
    assert place.report()["transfers"]["transfer"]["transfers"] == 3


def test_data_losses_and_metrics_of_the_user(place) -> None:
    place.plan["models"]["wide"].update(data="nets.py:data", loss="nets.py:loss")
    place.plan["models"]["kernels"].update(data="nets.py:data", loss="nets.py:loss", metric="nets.py:right", goal="max")
    place.run()
    [comparison] = place.report()["transfers"]["transfer"]["comparisons"]
    assert comparison["metric"] == "nets.py:right"
    assert all(value == int(value) for value in comparison["arms"]["transfer"]["values"])


def test_the_best_weights_are_chosen_on_validation_data(place) -> None:
    place.transfer.update(select="best", save_every=1, controls=[])
    place.plan["models"]["kernels"].update(metric="loss")
    place.plan["models"]["kernels"]["optimizer"] = {"lr": 0.3, "schedule": "constant"}
    seen: list[float] = []
    plain = Side.score

    def noted(side: Side, part: str) -> float:
        score = plain(side, part)
        if side.name == "kernels" and part == "validation":
            seen.append(score)
        return score

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Side, "score", noted)
        place.run()
    report = place.report()["transfers"]["transfer"]
    *along, kept = seen
    assert len(along) == 12
    assert kept == min(along) != along[-1]
    assert report["selected_steps"] == [along.index(kept) + 1]


def test_the_digits_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    from mergekit_px.cli import main

    plan = Path(__file__).parents[3] / "recipes" / "transfer-digits.yaml"
    monkeypatch.chdir(tmp_path)
    names = load_transfer_plan(plan).plan.transfers
    assert set(names) == {"mlp-to-cnn", "classifier-to-conv", "self"}
    shorter = ["transfers.mlp-to-cnn.steps=40", "transfers.mlp-to-cnn.controls=[none, sham]"]
    shorter += [
        f"transfers.{name}.{key}" for name in ("self", "classifier-to-conv") for key in ("steps=3", "controls=[]")
    ]
    assert main(["transfer", str(plan), "--threads", "1", "-o", "out", "--set", *shorter]) == 0
    report = json.loads(Path("out/report.json").read_text())
    assert len(report["seeds"]) == 5
    assert set(report["transfers"]) == set(names)
    [comparison] = report["transfers"]["mlp-to-cnn"]["comparisons"]
    assert set(comparison["arms"]) == {"transfer", "none", "sham"}
    assert comparison["arms"]["none"]["mean"] > 85.0
    assert comparison["transfer_minus"]["none"]["mean"] >= -1.5
    assert Path("out/report.png").stat().st_size > 10_000
    assert "Experimental." in capsys.readouterr().err


def test_a_transformers_model_takes_part(place) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=4,
        patch_size=2,
        num_channels=1,
        num_labels=3,
    )
    transformers.utils.logging.disable_progress_bar()
    transformers.ViTForImageClassification(config).save_pretrained("vit")
    with np.load("long.npz") as arrays:
        np.savez("images.npz", pixel_values=arrays["pixels"], labels=arrays["labels"])
    place.plan["models"]["vit"] = {"weights": "./vit", "data": "images.npz"}
    name = "vit.encoder.layer.0.attention.attention.query.weight"
    place.transfer.update(target="vit", pairs=[{"target": name, "source": "first.weight"}])
    place.run()
    before, after = place.tensors("vit"), place.tensors("out/transfer/target")
    assert before.keys() == after.keys()
    assert not torch.equal(before[name], after[name])
    model = transformers.AutoModelForImageClassification.from_pretrained("out/transfer/target")
    assert torch.equal(model.classifier.bias, after["classifier.bias"])


@pytest.mark.gpu
def test_a_transfer_on_cuda(place) -> None:
    place.run("--device", "cuda")
    assert place.report()["device"].startswith("cuda")
