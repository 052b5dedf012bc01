from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_px.errors import RecipeError
from mergekit_px.learn.transfer.load import load_transfer_plan
from mergekit_px.learn.transfer.plan import TransferPlan, Wanted
from mergekit_px.learn.transfer.presets import PRESETS, filled_model, filled_transfer

PLAN = """\
models:
  big: {weights: ./big, data: train.npz}
  small:
    weights: ./small
    data: {train: train.npz, validation: 0.2}
transfer:
  source: big
  target: small
  pairs:
    - {target: a.weight, source: b.weight, rank: [8, full]}
"""


def load(tmp_path: Path, text: str, **options: object) -> object:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    return load_transfer_plan(path, **options)


def test_the_short_forms_mean_the_long_ones(tmp_path: Path) -> None:
    loaded = load(tmp_path, PLAN)
    assert list(loaded.plan.transfers) == ["transfer"]
    assert loaded.plan.models["big"].data.train == "train.npz"
    assert loaded.plan.models["small"].data.validation == 0.2
    assert loaded.where("transfers", "transfer", "pairs", 0).endswith("plan.yaml:10:7")


def test_overrides_change_the_plan(tmp_path: Path) -> None:
    loaded = load(tmp_path, PLAN, overrides=["transfer.cycle=8", "seeds=3", "models.big.batch=4"])
    assert loaded.plan.transfers["transfer"].cycle == 8
    assert (loaded.plan.seeds, loaded.plan.models["big"].batch) == (3, 4)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  target: small", "  target: smal", ":8:11: there is no model 'smal'; did you mean 'small'?"),
        (
            "  source: big",
            "  cycel: 3\n  source: big",
            ":7:3: unknown key 'cycel' in 'transfers.transfer'; did you mean 'cycle'?",
        ),
        (
            "  source: big",
            "  cycle: 0\n  source: big",
            ":7:10: 'transfers.transfer.cycle' must be a whole number of 1 or more, not 0",
        ),
        (
            "  source: big",
            "  stop_at: 1.5\n  source: big",
            "'transfers.transfer.stop_at' must be a share above 0, at most 1, not 1.5",
        ),
        (
            "  source: big",
            "  mode: jiont\n  source: big",
            "'transfers.transfer.mode' must be joint, frozen, mutual or self, not 'jiont'",
        ),
        (
            "  source: big",
            "  adapter: {forms: [rr, xx]}\n  source: big",
            "'transfers.transfer.adapter.forms' must be a list of rr, rc, cr and cc",
        ),
        (
            "  source: big",
            "  adapter: 3\n  source: big",
            "'transfers.transfer.adapter' must be a mapping of settings, not 3",
        ),
        (
            "  source: big",
            "  preset: vision\n  source: big",
            "there is no preset 'vision'; known are cross-structure, cross-modal",
        ),
        ("  source: big\n", "", ":6:1: mode joint needs a source"),
        (
            "  source: big",
            "  source: small",
            ":7:11: source and target are one model; within one model, write mode: self",
        ),
        ("  source: big", "  source: big\n  mode: self", "in mode self the source is the target"),
        (
            "validation: 0.2",
            "validation: [1]",
            "'models.small.data.validation' must be a file, or a share between 0 and 1",
        ),
        (
            "validation: 0.2",
            "valdation: 0.2",
            "unknown key 'valdation' in 'models.small.data'; did you mean 'validation'?",
        ),
        ("weights: ./big, ", "", ":2:3: 'models.big' names neither weights nor a model"),
        (", data: train.npz", "", ":2:3: model 'big' learns in 'transfer' and has no data"),
        ("rank: [8, full]", "rank: [8, 8, 8]", "'rank' is one value or two, not 3"),
        ("rank: [8, full]", "rank: 0", ":10:7: a rank is a whole number of 1 or more, not 0"),
        ("rank: [8, full]", "rank: all", "must be a whole number, full, or two of them for target and source"),
        (", source: b.weight", "", "'transfers.transfer.pairs.0.source' is missing"),
        (
            "rank: [8, full]}",
            "rank: 1}\n    - {target: a.weight, source: c.weight}",
            ":11:7: 'a.weight' is the target of two pairs",
        ),
        (
            "rank: [8, full]}",
            "rank: 1}\n    - {target: d.weight, source: b.weight, rank: 2}",
            ":11:7: 'b.weight' has one rank in this pair and another in one before it",
        ),
        ("transfer:\n", "transfers: {}\ntransfer:\n", ":7:1: a plan has either transfer or transfers"),
        ("small:", "../up:", "'../up' cannot be a name"),
        ("models:\n", "pxmerge: 1\nmodels:\n", "this is a recipe, not a plan of a transfer; use `pxmerge run`"),
        ("models:\n", "pxmerge_transfer: 2\nmodels:\n", "'pxmerge_transfer' must be 1, the version"),
        ("models:\n", "models: [\n", "not YAML"),
    ],
)
def test_errors_have_their_place(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = PLAN.replace(old, new)
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text)
    assert f"{tmp_path / 'plan.yaml'}" in str(caught.value)
    assert message in str(caught.value)


def test_a_frozen_source_needs_weights_and_no_data(tmp_path: Path) -> None:
    text = PLAN.replace(", data: train.npz", "").replace("transfer:\n", "transfer:\n  mode: frozen\n")
    load(tmp_path, text)
    with pytest.raises(RecipeError, match="mode frozen needs trained weights, and 'big' has none"):
        load(tmp_path, text.replace("weights: ./big", "model: nets.py:f"))


def test_mutual_sources_are_in_one_pair(tmp_path: Path) -> None:
    text = PLAN.replace("transfer:\n", "transfer:\n  mode: mutual\n") + "    - {target: c.weight, source: b.weight}\n"
    with pytest.raises(RecipeError, match="in mode mutual it receives too"):
        load(tmp_path, text)


def test_self_pairs_are_of_two_tensors(tmp_path: Path) -> None:
    text = PLAN.replace("  source: big", "  mode: self").replace(
        "source: b.weight, rank: [8, full]", "source: a.weight"
    )
    with pytest.raises(RecipeError, match=r"'a\.weight' is paired with itself"):
        load(tmp_path, text)


def test_pairs_may_be_missing_only_where_they_are_looked_for(tmp_path: Path) -> None:
    text = PLAN[: PLAN.index("  pairs:")]
    load(tmp_path, text, complete=False)
    with pytest.raises(RecipeError, match="no tensors are paired; `pxmerge pairs` lists tensors that can be"):
        load(tmp_path, text)
    models = PLAN[: PLAN.index("transfer:")]
    load(tmp_path, models, complete=False)
    with pytest.raises(RecipeError, match="'transfers' is empty"):
        load(tmp_path, models)


def test_files_that_are_no_plan(tmp_path: Path) -> None:
    for path, message in [(tmp_path / "none.yaml", "there is no such plan"), (tmp_path, "a folder is no plan")]:
        with pytest.raises(RecipeError, match=message):
            load_transfer_plan(path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    with pytest.raises(RecipeError, match="not UTF-8 text"):
        load_transfer_plan(tmp_path / "latin.yaml")
    with pytest.raises(RecipeError, match="a plan is a mapping with models and transfers"):
        load(tmp_path, "- a")


def test_explicit_values_go_before_the_preset_and_that_before_the_defaults(tmp_path: Path) -> None:
    text = PLAN.replace("transfer:\n", "transfer:\n  preset: cross-task\n  adapter: {heads: 3}\n")
    plan = load(tmp_path, text, overrides=["models.small.optimizer.lr=0.5"]).plan
    transfer = filled_transfer(plan.transfers["transfer"])
    assert (transfer.cycle, transfer.adapter.heads, transfer.adapter.layers, transfer.adapter.lr) == (1, 3, 2, 1e-4)
    target = filled_model(plan.models["small"], transfer, is_source=False)
    source = filled_model(plan.models["big"], transfer, is_source=True)
    assert (target.batch, target.optimizer.lr, target.optimizer.weight_decay) == (6, 0.5, 1e-2)
    assert (source.batch, source.optimizer.lr, source.optimizer.weight_decay) == (32, 5e-5, 1e-5)
    without = filled_transfer(load(tmp_path, PLAN).plan.transfers["transfer"])
    assert (without.cycle, without.adapter.heads, without.adapter.layers) == (4, 4, 2)
    assert filled_model(plan.models["small"], without, is_source=False).batch == 32


def test_the_presets_are_those_of_the_appendix() -> None:
    rows = {
        name: (one.target.batch, one.target.lr, one.adapter_lr, one.layers, one.heads, one.cycle)
        for name, one in PRESETS.items()
    }
    assert rows == {  # the rate of 1e-4 is the default, where the appendix gives none
        "cross-structure": (128, 1e-2, 1e-3, 2, 8, 4),
        "cross-modal": (16, 1e-4, 1e-4, 2, 12, 2),
        "cross-task": (6, 5e-5, 1e-4, 2, 12, 1),
        "self": (128, 1e-2, 1e-3, 2, 8, 4),
    }


def test_every_key_says_what_it_wants() -> None:
    parts = [TransferPlan]
    for part in parts:
        for name, field in part.model_fields.items():
            assert any(isinstance(mark, Wanted) for mark in field.metadata), f"{part.__name__}.{name}"
            parts += [one for one in _parts_of(field.annotation) if one not in parts]
    assert len(parts) == 7


def _parts_of(annotation: object) -> list[type[TransferPlan]]:
    from typing import get_args

    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [part for argument in get_args(annotation) for part in _parts_of(argument)]
