"""``pxmerge report`` on what was learned: the maps and curves of the document, and the page that shows them."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from mergekit_px.cli import main
from mergekit_px.learn.align.settings import AlignReport
from mergekit_px.learn.declare import Report
from mergekit_px.learn.ofasd.settings import OfasdReport
from mergekit_px.learn.search.settings import SearchReport
from mergekit_px.learn.tune.settings import TuneReport

LAYER = "model.layers.{}.{}.weight"
TRACE = [(0, None, 0.9), (2, 0.7, 0.5), (4, 0.4, 0.6)]
COEFFICIENTS = {
    LAYER.format(0, "mlp.up_proj"): [0.5, -0.25],
    LAYER.format(1, "mlp.up_proj"): [1.0, 0.125],
    LAYER.format(1, "self_attn.q_proj"): [0.75, 0.0],
    "lm_head.weight": [0.1, 0.2],
}
OFASD = OfasdReport(
    learner="ofasd",
    settings={"steps": 4, "groups": [], "stream": True},
    sources=["math", "<code>"],
    shares=[0.5, 0.5],
    labels="classes",
    examples={"test": 3},
    steps=4,
    best_step=2,
    best_validation_score=0.5,
    trace=TRACE,
    test={"learned": {"accuracy": 50.0}},
    teacher=None,
    warnings=["of no use"],
    coefficients=COEFFICIENTS,
    recipe="recipe.yaml",
)
ALIGN = AlignReport(
    learner="align",
    settings={"scale": 0.5},
    examples={"test": 1},
    left_out=[],
    norm={},
    test={},
    not_scored={},
    scales=[{"scale": 0.5, "naive": 40.0, "aligned": 50.0}, {"scale": 1.0, "naive": 30.0, "aligned": 60.0}],
    trace=TRACE,
    rotations={
        "matrices": 1,
        "orthogonality_error": 0.0,
        "mean_distance_from_identity": 0.5,
        "distances_from_identity": {f"{LAYER.format(0, 'mlp.up_proj')}.out": 0.5},
        "stay": [],
    },
)
TUNE = TuneReport(
    learner="tune",
    labels="classes",
    trained_values=4,
    examples={},
    steps=4,
    selected_step=2,
    stopped=None,
    trace=[{"step": 2, "loss": 0.7, "validation": {"accuracy": 50.0, "loss": 0.5}}],
    scores={},
    changes={LAYER.format(3, "mlp.up_proj"): 0.125},
)
SEARCH = SearchReport(
    learner="search",
    variables=[],
    score="accuracy",
    objectives=["score:max"],
    trials=2,
    failed=1,
    stopped="all was tried",
    best={"trial": 1, "set": ["merge.sources.a=0.5"], "values": {"merge.sources.a": 0.5}},
    pick="score",
    front=[],
    scores={"best": {"validation": 1.0}},
)
TRIALS = [
    {"search": "x", "variables": ["merge.sources.a"], "objectives": [{"name": "score", "minimize": None}]},
    {"number": 0, "values": [], "scores": {"score": 0.25}, "seconds": 1.0},
    {"number": 1, "values": [0.5], "scores": {"score": 1.0}, "seconds": 1.0},
    {"number": 2, "values": [1.0], "scores": None, "seconds": 1.0},
]


def result(folder: Path, report: Report, **changes: object) -> Path:
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report.model_dump(mode="json") | changes))
    (folder / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in TRIALS))
    return folder


def test_coefficients_and_traces_are_drawn(run, tmp_path: Path) -> None:
    folder = result(tmp_path / "learned", OFASD)
    done = run("report", folder, "--json")
    assert done.code == 0 and "of no use" in done.stderr
    document = done.document()
    first, second = document["heat_maps"]
    assert (first["of"], first["rows"], first["columns"]) == ("math", ["mlp.up_proj", "self_attn.q_proj"], [0, 1])
    assert first["values"] == [[0.5, 1.0], [None, 0.75]] and second["values"] == [[-0.25, 0.125], [None, 0.0]]
    assert (first["low"], first["high"], first["scale"]) == (-1.0, 1.0, "diverging")
    loss, score = document["curves"]
    assert loss["lines"] == {"loss": [[2, 0.7], [4, 0.4]]} and score["lines"]["score"][0] == [0, 0.9]
    assert score["marked"] == [2, "chosen"]
    assert ["lm_head.weight", "0.1", "0.2"] in [row for table in document["tables"] for row in table["rows"]]
    page = (tmp_path / "learned-report.html").read_text()
    assert "mlp.up_proj, layer 1: 1" in page and "&lt;code&gt;" in page and "<code>math" not in page
    assert page.count("<circle") == 5 and "<script" not in page and "http:" not in page and "https:" not in page
    assert "<td>yes</td>" in page and ">groups<" not in page


@pytest.mark.parametrize(
    ("report", "maps", "lines"),
    [
        (ALIGN, [[0.5]], ["loss", "score", "naive", "aligned"]),
        (TUNE, [[0.125]], ["loss", "accuracy", "loss"]),
        (SEARCH, None, ["score", "score"]),
    ],
)
def test_each_learner_has_its_pictures(
    run, tmp_path: Path, report: Report, maps: list[list[float]] | None, lines: list[str]
) -> None:
    done = run("report", result(tmp_path / "learned", report), "--json")
    assert done.code == 0, done.stderr
    document = done.document()
    assert [grid["values"] for grid in document["heat_maps"]] == ([maps] if maps else [])
    assert [name for each in document["curves"] for name in each["lines"]] == lines
    jsonschema.validate(document, json.loads(run("schema", "--of", "report").stdout))
    if report is SEARCH:
        by_trial, by_value = document["curves"]
        assert by_trial["lines"]["score"] == [[0, 0.25], [1, 1.0]] and not by_trial["joined"]
        assert by_value["lines"]["score"] == [[0.5, 1.0]] and by_value["marked"] == [0.5, "best"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learner": "tuen"}, "did you mean 'tune'"),
        ({"changes": 3}, "not a report as this version writes them"),
        ({"learner": ""}, "no pxmerge.lock.json"),
    ],
)
def test_another_report_is_refused(tmp_path: Path, capsys, changes: dict, words: str) -> None:
    assert main(["report", str(result(tmp_path / "learned", TUNE, **changes))]) in (2, 3)
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not (tmp_path / "learned-report.html").exists()
