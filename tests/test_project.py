"""What the project says of itself: the README's commands work, versions agree, files stay small and portable."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from project_pages import marked_blocks

import mergekit_px
from mergekit_px.cli import main
from mergekit_px.methods import load_methods

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(
    path
    for path in (ROOT / "recipes").glob("*.y*ml")
    if re.search(r"^(pxmerge|merge_method):", path.read_text(), re.MULTILINE)
)
"""The merges; plans of other commands are run by the tests of those."""
LONGEST_MODULE = 500


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mergekit_px.demo.tasks.TEST_IMAGES", 100)
    monkeypatch.setattr("mergekit_px.demo.train.SHARED_IMAGES", 1400)
    monkeypatch.setattr("mergekit_px.demo.train.RUN_STEPS", 12)
    monkeypatch.setattr("mergekit_px.demo.train.SAVED_EVERY", 2)
    monkeypatch.setattr("mergekit_px.demo.train.FINE_TUNE_EPOCHS", 1)
    monkeypatch.setattr("mergekit_px.demo.LEFT_OUT", load_methods().keys() - {"linear", "ties"})
    blocks = list(marked_blocks((ROOT / "README.md").read_text()))
    assert len(blocks) >= 6
    for mark, language, text in blocks:
        if mark != "run":
            Path(mark.removeprefix("file: ")).write_text(text)
        elif language == "python":
            exec(compile(text, "README.md", "exec"), {})
        else:
            for line in text.splitlines():
                words = shlex.split(line, comments=True)
                assert words[0] == "pxmerge"
                assert main(words[1:]) == 0, (line, capsys.readouterr().err)
    for folder in ("demo/base", "ties-merge", "merged", "turning", "half-turned", "from-python"):
        assert (tmp_path / folder / "model.safetensors").is_file(), folder


@pytest.mark.parametrize("recipe", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(
    recipe: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(models.parent)
    assert main(["run", str(recipe), "--output", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    assert main(["verify", str(tmp_path / "out")]) == 0


def imported_modules(path: Path, modules: dict[str, Path]) -> set[str]:
    """What a file imports of the package, at its head, inside functions and for types alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in names}
    return found & modules.keys()


def test_no_files_import_one_another_in_a_circle() -> None:
    package = Path(mergekit_px.__file__).parent
    modules = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in package.rglob("*.py")
    }
    imports = {name: imported_modules(path, modules) - {name} for name, path in modules.items()}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 8


def test_all_is_what_is_exported() -> None:
    tree = ast.parse(Path(mergekit_px.__file__).read_text())
    declared = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name for node in declared.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(mergekit_px.__all__) == imported | {"__version__"}
    assert len(mergekit_px.__all__) == len(set(mergekit_px.__all__))
    found: dict[str, object] = {}
    exec("from mergekit_px import *", found)
    assert set(mergekit_px.__all__) <= found.keys()


def test_version_is_that_of_the_changelog() -> None:
    versions = re.findall(r"^## \[(\S+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == mergekit_px.__version__


def test_links_between_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
            other = page.parent / target if target else page
            assert other.exists(), f"{page.name} links to {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", other.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in anchors, f"{page.name}: {anchor}"


def test_modules_are_short(tracked: list[Path]) -> None:
    lengths = {path: len(path.read_bytes().splitlines()) for path in tracked if path.suffix == ".py"}
    long = {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length >= LONGEST_MODULE}
    assert not long


def test_no_file_knows_a_machine_or_a_package_index(tracked: list[Path]) -> None:
    machine = re.compile(rb"/(?:root|work|Users|opt)/\w")
    index = re.compile(
        rb"(?:pypi|pythonhosted|download\.pytorch)\.org|index-url[= ]+\S*[./:]"
    )  # the option, not an address
    found = [
        f"{path.relative_to(ROOT)}: {match[0].decode()}"
        for path in tracked
        if path != Path(__file__) and path.suffix not in (".png",)
        for pattern in (machine, index)
        if (match := pattern.search(path.read_bytes()))
    ]
    assert not found
