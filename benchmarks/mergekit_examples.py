"""mergekit's own examples and the configs in its documentation, run by mergekit and by pxmerge, and compared.

    git clone https://github.com/arcee-ai/mergekit
    python benchmarks/mergekit_examples.py mergekit --peer path/to/venv      # a clone, and mergekit; nothing is fetched
    python benchmarks/mergekit_examples.py mergekit --peer path/to/venv --page docs/mergekit.md

Takes every YAML file of ``examples`` and every YAML block of the pages, puts tiny models in the place of those that
they name, and adds a merge to a part about tokens. Both tools merge them in float32, with nothing that depends on
chance. Mixtures are built here only. ``--page`` puts the table between the marks of a page.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from mergekit_configs import Models, deepest, merge_here, placed, put, run_both, start_peer

ABOUT_TOKENS = {"tokenizer", "tokenizer_source", "chat_template"}
_BLOCK = re.compile(r"```ya?ml\n(.*?)```", re.DOTALL)


def written_configs(clone: Path) -> Iterator[tuple[str, str]]:
    """Where each config is, and its text."""
    for file in sorted(clone.glob("examples/*.y*ml")):
        yield file.relative_to(clone).as_posix(), file.read_text()
    for page in sorted([*clone.glob("*.md"), *clone.glob("docs/*.md")]):
        for number, block in enumerate(_BLOCK.findall(page.read_text()), 1):
            yield f"{page.relative_to(clone).as_posix()}, {number}", block


def completed(tokens: dict[str, Any]) -> dict[str, Any]:
    """A part about tokens with a merge of two models and of those that it names."""

    def named(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for key, child in node.items():
                yield from [child] if key in ("source", "model") and isinstance(child, str) else named(child)

    tokenizer = tokens.get("tokenizer") or {}
    names = dict.fromkeys(("a", "b", *named(tokenizer.get("tokens"))))
    models = [{"model": name, "parameters": {"weight": 1 / len(names)}} for name in names]
    return {"merge_method": "linear", "models": models, **tokens}


def outcome(text: str, work: Path, peer: subprocess.Popen[str]) -> tuple[str, str, str]:
    """(method, verdict, cause) of a config."""
    if re.search(r"^genome:", text, re.MULTILINE):
        return "", "another form", "a genome of mergekit-evolve; `pxmerge search` takes a config and `--over`"
    if "..." in text:
        return "", "cut short", "what `...` stands for is left out there"
    documents = [document for document in yaml.safe_load_all(text) if document is not None]
    if not any({"merge_method", "experts"} & document.keys() for document in documents):
        if not any(document.keys() & ABOUT_TOKENS for document in documents):
            return "", "a part", "of a genome" if "filters" in documents[0] else "of a config"
        documents = [completed(documents[0])]
    is_mixture = any("experts" in document for document in documents)
    method = "moe" if is_mixture else " + ".join(str(document.get("merge_method", "?")) for document in documents)
    steps = frozenset(document["name"] for document in documents if document.get("name"))
    layers = deepest(documents)
    kind = work / f"llama-{layers}"
    kind.mkdir(parents=True, exist_ok=True)
    models = Models(kind, "llama", layers)
    config = work / "config.yml"
    config.write_text(yaml.safe_dump_all([_placed(document, models, steps) for document in documents], sort_keys=False))
    if not is_mixture:
        verdict, cause = run_both(config, work, peer)
        return method, verdict, cause.replace(str(kind), "").partition(";")[0][:160]
    error = merge_here(config, work / "mixture", "moe", "build")
    shutil.rmtree(work / "mixture", ignore_errors=True)
    return method, "refused here" if error else "built", (error or "").replace(str(kind), "").replace("|", "/")


def _placed(document: dict[str, Any], models: Models, steps: frozenset[str]) -> Any:
    for expert in document.get("experts") or ():
        if isinstance(expert, dict) and "source_model" in expert:
            expert["source_model"] = models.replaced(str(expert["source_model"]))
    return placed(document, models, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="a clone of mergekit")
    parser.add_argument("--page", type=Path, help="a page that takes the table")
    parser.add_argument("--peer", type=Path, required=True, help="a virtual environment with mergekit")
    options = parser.parse_args()
    peer, _ = start_peer(options.peer)
    work = Path(tempfile.mkdtemp(prefix="pxmerge-examples-"))
    lines = ["| config | method | outcome | difference or cause |", "| --- | --- | --- | --- |"]
    for name, text in written_configs(options.clone):
        lines.append("| " + " | ".join((name, *outcome(text, work, peer))) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    peer.terminate()
    shutil.rmtree(work, ignore_errors=True)
    table = "\n".join(lines) + "\n"
    print(table)
    if options.page is not None:
        put(options.page, "examples", table)


if __name__ == "__main__":
    main()
