from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mergekit_px.learn.transfer.plan import Adapter, Data, Model, Optimizer, Pair, Transfer, TransferPlan
from mergekit_px.learn.transfer.report import summary, telling_t, write_picture
from mergekit_px.learn.transfer.table import explanation, markdown_table, table_rows


def document(seeds: int, *, metric: str = "accuracy") -> dict:
    generator = np.random.default_rng(0)
    arms = {arm: summary(list(90.0 + generator.normal(size=seeds))) for arm in ("transfer", "none", "sham")}
    minus = {
        arm: summary([a - b for a, b in zip(arms["transfer"]["values"], arms[arm]["values"], strict=True)])
        for arm in ("none", "sham")
    }
    comparison = {"model": "cnn", "metric": metric, "arms": arms, "transfer_minus": minus}
    return {
        "seeds": list(range(seeds)),
        "telling_t": telling_t(seeds),
        "transfers": {"first": {"comparisons": [comparison]}, "second": {"comparisons": [comparison, comparison]}},
    }


def test_the_summary_is_that_of_a_paired_t_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    ours, theirs = [92.1, 91.0, 93.4, 92.2], [91.8, 91.4, 92.0, 91.9]
    found = summary([a - b for a, b in zip(ours, theirs, strict=True)])
    assert found["t"] == pytest.approx(stats.ttest_rel(ours, theirs).statistic)
    assert found["sd"] == pytest.approx(np.std(np.subtract(ours, theirs), ddof=1))
    assert (summary([1.0])["sd"], summary([1.0])["t"]) == (None, None)
    assert summary([0.5, 0.5])["t"] is None


def test_the_telling_t_is_the_quantile() -> None:
    stats = pytest.importorskip("scipy.stats")
    assert telling_t(1) is None
    for seeds in range(2, 32):
        assert telling_t(seeds) == pytest.approx(stats.t.ppf(0.975, seeds - 1), abs=0.006)
    assert telling_t(500) == 2.04


def test_the_table_has_a_row_for_each_model_and_no_empty_column() -> None:
    titles, *rows = table_rows(document(5))
    assert titles == [
        "transfer",
        "model",
        "metric",
        "with transfer",
        "without",
        "sham source",
        "transfer - without",
        "transfer - sham",
    ]
    assert [row[0] for row in rows] == ["first", "second", "second"]
    assert rows[0][2] == "accuracy %"
    assert "sd " in rows[0][-1] and "t " in rows[0][-1]
    lines = markdown_table(document(5)).splitlines()
    assert len({len(line) for line in lines[:5]}) == 1
    assert "With 5 seeds, |t| below 2.78 shows nothing." in lines[-1]


def test_one_seed_is_called_that() -> None:
    assert explanation(document(1)).endswith("One seed says nothing of the spread.")
    assert "sd" not in markdown_table(document(1)).splitlines()[2]


def test_the_picture_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_picture(document(3, metric="loss"), tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_names_every_key_of_a_plan() -> None:
    page = (Path(__file__).parents[3] / "docs" / "transfer.md").read_text(encoding="utf-8")
    for part in (TransferPlan, Model, Data, Optimizer, Transfer, Pair, Adapter):
        for name in part.model_fields:
            assert f"| `{name}` |" in page, f"{part.__name__}.{name}"
