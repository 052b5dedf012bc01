"""Commands made from the declarations of learners."""

from __future__ import annotations

import pytest

from mergekit_px.errors import UsageError
from mergekit_px.learn import find_learner, load_learners
from mergekit_px.learn.declare import LearnerSettings, make_settings

TUNE = ("tune", "c.safetensors", "--base", "base", "--data", "data.npz")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("ofasd --clients a b", "--sources"),
        ("ofasd --no-compare", "--controls"),
        ("tune --rate 0.1", "--learning-rate"),
        ("tune --decay 0.1", "--weight-decay"),
        ("tune --epochs 3", "--steps"),
        ("align --target-base b", "--base"),
        ("align --test-data b", "--test"),
    ],
)
def test_an_option_under_another_name_is_told_its_own(run, words: str, name: str) -> None:
    outcome = run(*words.split())
    assert outcome.code == 2 and outcome.stderr.count("\n") == 1
    assert f"No such option: {words.split()[1]} (it is called {name})" in outcome.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--batch", "0"), "--batch must be at least 1, not 0"),
        (("--steps", "1.5"), "--steps must be a whole number, not 1.5"),
        (("--weight-decay", "much"), "--weight-decay must be a number, not much"),
        (("--learning-rate", "nan"), "--learning-rate must be a finite number, not nan"),
        (("--test", "1.5"), "--test must be a share, at least 0 and below 1, not 1.5"),
        (("--resume", "--overwrite"), "give one of them"),
    ],
)
def test_what_a_setting_cannot_be_names_the_flag(run, words: tuple[str, ...], message: str) -> None:
    outcome = run(*TUNE, *words)
    assert outcome.code == 2 and message in outcome.stderr


def test_python_s_errors_name_the_setting() -> None:
    tune = find_learner("tune")
    given = {"components": "c", "base": "b", "data": "d"}
    with pytest.raises(UsageError, match="tune has no setting 'learningrate'; did you mean learning_rate"):
        make_settings(tune, {**given, "learningrate": 1})
    with pytest.raises(UsageError, match="learning_rate must be at least 0, not -1"):
        make_settings(tune, {**given, "learning_rate": -1})
    with pytest.raises(UsageError, match="tune needs data"):
        make_settings(tune, {"components": "c", "base": "b"})


def test_the_same_thing_has_the_same_name_everywhere() -> None:
    learners = load_learners()
    assert learners.keys() >= {"align", "ofasd", "tune", "search", "stats", "transfer", "acmap map", "acmap classify"}
    for learner in learners.values():
        names = learner.settings.model_fields.keys()
        assert not names & {"clients", "rate", "lr", "decay", "epochs", "compare", "target_base", "factory", "code"}
        schema = learner.report.model_json_schema()
        assert schema["properties"].keys() >= {"settings", "inputs", "device", "versions"} and schema["required"]
        if issubclass(learner.settings, LearnerSettings):
            assert names >= {"output", "resume", "overwrite", "device", "allow_code"}
