"""The page on methods of one's own works as it is written."""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from folders import write_llamas
from project_pages import marked_blocks

from mergekit_px import plug_ins
from mergekit_px.adapters import registry
from mergekit_px.cli import main
from mergekit_px.errors import UsageError
from mergekit_px.learn import find_learner, load_learners
from mergekit_px.learn.declare import REGISTRY as LEARNERS
from mergekit_px.methods import load_methods
from mergekit_px.methods.declare import REGISTRY

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    known, learners = dict(load_methods()), dict(load_learners())
    write_llamas(tmp_path, "math", "code")
    yield
    REGISTRY.clear()
    REGISTRY.update(known)
    LEARNERS.clear()
    LEARNERS.update(learners)
    for name in [name for name in sys.modules if name.startswith("pxmerge_user") or name == "lerp_clip"]:
        del sys.modules[name]


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for mark, language, text in marked_blocks(PAGE.read_text()):
        if mark != "run":
            Path(mark.removeprefix("file: ")).write_text(text)
        elif language == "python":
            subprocess.run([sys.executable, "-c", text], check=True)
        else:
            for line in text.splitlines():
                words = shlex.split(line)
                assert main(words[1:]) == 0, (line, capsys.readouterr().err)
    for output in ("clipped", "unit", "picked/model"):
        assert Path(output, "model.safetensors").is_file()
    report = json.loads(Path("picked/report.json").read_text())
    assert report["loss"].keys() == {"validation", "test"} and report["inputs"]["source"][0]["reference"] == "math"
    assert main(["verify", "picked", "-q"]) == 0
    assert (
        len(next(text for mark, _, text in marked_blocks(PAGE.read_text()) if "pick.py" in mark).split("\n\n\n")) == 4
    )


METHOD = "from mergekit_px import merge_method\n@merge_method(space='any', access='elementwise')\ndef {0}(sources):\n"
METHOD += '    """First of all."""\n    return sources[0]\n'


@pytest.mark.parametrize(
    ("text", "words", "code", "message"),
    [
        (METHOD, "first-of --sources math code -o out --plugin p.py", 2, "allow it with --allow-code"),
        (
            "x = 1\n",
            "first-of --sources math code --plugin p.py --allow-code",
            2,
            "p.py: it declares no merge method and no learner",
        ),
        ("1 / 0\n", "first-of --sources math --plugin=p.py --allow-code", 2, "p.py: it raised ZeroDivisionError"),
        (METHOD, "first-of --sources math --plugin other.py --allow-code", 3, "other.py: no such file"),
        (METHOD, "first-of --sources math --plugin p.txt --allow-code", 2, "takes a Python file"),
        (METHOD, "first-of --sources math --allow-code --plugin", 2, "takes a Python file"),
        (METHOD, "first-of --sources math code -o out --plugin p.py --allow-code", 0, ""),
    ],
)
def test_a_plug_in_runs_only_where_it_is_allowed(
    text: str, words: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("p.py").write_text(text.replace("{0}", "first_of"))
    assert main(words.split()) == code
    assert message in capsys.readouterr().err


def test_learners_of_other_packages_are_known_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    import mergekit_px.learn as learn

    text = next(text for mark, _, text in marked_blocks(PAGE.read_text()) if mark == "file: pick.py")
    Path("pick.py").write_text(text.replace("def pick(", "def chosen("))
    good, bad = Entry(None), Entry(ImportError("no such package"))
    monkeypatch.setattr(good, "load", lambda: importlib.import_module("pick"))
    monkeypatch.setattr(plug_ins, "entry_points", lambda group: [good, bad])
    learn._import_all.cache_clear()
    with pytest.warns(UserWarning, match="'GAIN' .* is left out: no such package"):
        assert find_learner("chosen").summary.startswith("Find the scale")
    with pytest.raises(UsageError, match="unknown learner 'chosne'; did you mean 'chosen'"):
        find_learner("chosne")
    monkeypatch.undo()
    learn._import_all.cache_clear()


class Entry:
    name = "GAIN"
    value = "package:GAIN"

    def __init__(self, found: object) -> None:
        self.found = found

    def load(self) -> object:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def test_adapter_kinds_of_other_packages_are_known_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    family = registry.FAMILIES["HRA"]
    monkeypatch.setattr(plug_ins, "entry_points", lambda group: [Entry(family)])
    registry.families.cache_clear()
    assert registry.families()["GAIN"] is family
    for found, reason in ((ImportError("no such package"), "no such package"), ("a word", "it is no Family")):
        monkeypatch.setattr(plug_ins, "entry_points", lambda group, found=found: [Entry(found)])
        registry.families.cache_clear()
        with pytest.warns(UserWarning, match=reason):
            assert "GAIN" not in registry.families()
    registry.families.cache_clear()
