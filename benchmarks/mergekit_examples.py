"""Whether mergekit's own examples, and the configs in its documentation, are planned here.

    git clone https://github.com/arcee-ai/mergekit
    python benchmarks/mergekit_examples.py mergekit                          # a clone; nothing is fetched
    python benchmarks/mergekit_examples.py mergekit --page docs/mergekit.md

Takes every YAML file of ``examples`` and every YAML block of the pages, puts tiny models in the place of those that
they name, adds two models to a part about tokens, and has ``pxmerge plan`` (``moe build --dry-run`` for mixtures) say
what it would do. ``--page`` puts the table between the marks of a page.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from mergekit_configs import Models, deepest, placed, put

from mergekit_px.cli import main as pxmerge

ABOUT_TOKENS = {"tokenizer", "tokenizer_source", "chat_template"}
WHOLE = {"merge_method": "linear", "models": [{"model": name, "parameters": {"weight": 0.5}} for name in ("a", "b")]}
"""What makes a config of a part about tokens."""

_BLOCK = re.compile(r"```ya?ml\n(.*?)```", re.DOTALL)


def written_configs(clone: Path) -> Iterator[tuple[str, str]]:
    """Where each config is, and its text."""
    for file in sorted(clone.glob("examples/*.y*ml")):
        yield file.relative_to(clone).as_posix(), file.read_text()
    for page in sorted([*clone.glob("*.md"), *clone.glob("docs/*.md")]):
        for number, block in enumerate(_BLOCK.findall(page.read_text()), 1):
            yield f"{page.relative_to(clone).as_posix()}, {number}", block


def outcome(text: str, work: Path) -> tuple[str, str, str]:
    """(method, verdict, cause) of a config."""
    if re.search(r"^genome:", text, re.MULTILINE):
        return "", "another form", "a genome of mergekit-evolve; `pxmerge search` takes a config and `--over`"
    if "..." in text:
        return "", "cut short", "what `...` stands for is left out there"
    documents = [document for document in yaml.safe_load_all(text) if document is not None]
    if not any({"merge_method", "experts"} & document.keys() for document in documents):
        if not any(document.keys() & ABOUT_TOKENS for document in documents):
            return "", "a part", "of a genome" if "filters" in documents[0] else "of a config"
        documents = [{**WHOLE, **documents[0]}]
    is_mixture = any("experts" in document for document in documents)
    method = "moe" if is_mixture else " + ".join(str(document.get("merge_method", "?")) for document in documents)
    steps = frozenset(document["name"] for document in documents if document.get("name"))
    layers = deepest(documents)
    kind = work / f"llama-{layers}"
    kind.mkdir(parents=True, exist_ok=True)
    models = Models(kind, "llama", layers)
    config = work / "config.yml"
    config.write_text(yaml.safe_dump_all([_placed(document, models, steps) for document in documents], sort_keys=False))
    verb = ["moe", "build", "--dry-run"] if is_mixture else ["plan"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(printed):
        code = pxmerge([*verb, str(config), "-o", str(work / "out"), "-q"])
    said = " ".join(printed.getvalue().split()).replace(f"{config}:", "").replace(str(kind), "").removeprefix("error: ")
    return method, "refused" if code else "planned", said.partition(";")[0][:160].replace("|", "/") if code else ""


def _placed(document: dict[str, Any], models: Models, steps: frozenset[str]) -> Any:
    for expert in document.get("experts") or ():
        if isinstance(expert, dict) and "source_model" in expert:
            expert["source_model"] = models.replaced(str(expert["source_model"]))
    return placed(document, models, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="a clone of mergekit")
    parser.add_argument("--page", type=Path, help="a page that takes the table")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="pxmerge-examples-"))
    lines = ["| config | method | here | cause |", "| --- | --- | --- | --- |"]
    for name, text in written_configs(options.clone):
        lines.append("| " + " | ".join((name, *outcome(text, work))) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    shutil.rmtree(work, ignore_errors=True)
    table = "\n".join(lines) + "\n"
    print(table)
    if options.page is not None:
        put(options.page, "examples", table)


if __name__ == "__main__":
    main()
