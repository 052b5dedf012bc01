"""Every document that ``--json`` prints holds to the schema that ``pxmerge schema --of`` publishes."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from published_documents import PUBLISHED

from mergekit_px.cli._commands import METHODS, all_commands
from mergekit_px.cli._documents import DOCUMENTS
from mergekit_px.cli._options import has_option
from mergekit_px.testing.checkpoints import fine_tune, tiny_llama_config, tiny_llama_tensors, write_checkpoint

RECIPE = "pxmerge: 1\nmodels: {a: a, b: b}\nmerge: {method: linear, sources: [a, b]}\noutput: {path: out}\n"
MIXTURE = "models: {a: a, b: b}\nmerge: {method: passthrough, sources: [a], mixture: {experts: [a, b]}}\n"
TASK = ("--base", "base", "--sources", "a", "b")
LINES = [
    ("run", "recipe.yaml"),
    ("run", "recipe.yaml", "--dry-run"),
    ("run", "recipe.yaml", "-o", "parts", "--part", "1/2"),
    ("run", "recipe.yaml", "-o", "parts", "--part", "2/2", "-q"),
    ("publish", "parts"),
    ("plan", "recipe.yaml", "-o", "elsewhere"),
    ("lock", "recipe.yaml"),
    ("verify", "out", "--rebuild"),
    ("report", "out"),
    ("svd", *TASK, "--top-k", "4", "--as", "components", "-o", "pool"),
    ("inspect", "base", "--tensors", "*norm*"),
    ("compare", "base", "a", "b", "--spectral"),
    ("advise", "a", "b", "--base", "base"),
    ("subtract", "a", "base", "-o", "delta"),
    ("adapter", "extract", "a", "base", "--rank", "2", "--include", "*mlp*", "-o", "lora-a"),
    ("adapter", "extract", "b", "base", "--rank", "2", "--include", "*mlp*", "-o", "lora-b"),
    ("adapter", "inspect", "lora-a", "--base", "base"),
    ("adapter", "merge", "lora-a", "lora-b", "-o", "lora"),
    ("adapter", "convert", "lora", "--to", "kohya", "-o", "lora.safetensors"),
    ("acmap", "merge", "lora-a", "lora-b", "--state", "state.safetensors", "-o", "running"),
    ("acmap", "export", "--state", "state.safetensors", "--adapter", "2", "-o", "second.safetensors"),
    ("data", "base", "data.npz", "-o", "arrays.safetensors"),
    ("average", "run", "--into", "mean", "-o", "averaged"),
    ("average", "run", "--window", "1", "-o", "windows"),
    ("methods",),
    ("methods", "ties"),
    ("doctor",),
    ("linear", "--sources", "a", "b", "-o", "linear"),
    ("add", "base", "delta", "-o", "added"),
    ("negate", "delta", "-o", "negated", "--dry-run"),
    ("scale", "delta", "--factor", "0.5", "-o", "scaled", "--dry-run"),
    ("analogy", "a", "b", "base", "-o", "analogy", "--dry-run"),
    ("adapter", "apply", "base", "lora-a", "-o", "applied"),
    ("moe", "build", "mixture.yaml", "-o", "mixture"),
    ("moe", "edit", "mixture", "--keep", "1", "-o", "edited"),
]

ELSEWHERE = {
    "pull": "cli/test_hub.py",
    "push": "cli/test_hub.py",
    "tokens transplant": "cli/test_tokens.py",
    "pairs": "learn/transfer/test_suggest.py",
    "transfer": "learn/transfer/test_run.py",
    "align": "learn/test_bad_input.py",
    "ofasd": "learn/test_bad_input.py",
    "tune": "learn/test_bad_input.py",
    "search": "learn/test_search.py",
    "stats": "learn/test_bad_input.py",
    "regmean-order": "learn/test_bad_input.py",
    "acmap map": "cli/test_acmap_map.py",
    "acmap classify": "cli/test_acmap_map.py",
}
"""Commands that need data or a server, and the tests that have them print a document, which is validated there."""


def test_every_command_with_json_has_a_schema() -> None:
    for name, command in all_commands().items():
        assert (name in PUBLISHED["properties"]) == has_option(command.load(), "json"), name


def test_a_document_of_every_command_is_held_to_its_schema() -> None:
    """Merge methods have one command in common, but for those that are listed by name."""
    here = {" ".join(line[:2]) if " ".join(line[:2]) in PUBLISHED["properties"] else line[0] for line in LINES}
    made = {name for name, command in all_commands().items() if command.group == METHODS and command.place is None}
    assert here & made
    assert {*here, *made, *ELSEWHERE} >= PUBLISHED["properties"].keys()
    for name, file in ELSEWHERE.items():
        text = (Path(__file__).parents[1] / file).read_text()
        assert "--json" in text and name.split()[-1] in text, name


def test_documents_hold_to_their_schemas(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny_llama_tensors(layers=1)
    for seed, name in enumerate(("base", "a", "b", "run/checkpoint-1", "run/checkpoint-2")):
        config = tiny_llama_config(layers=1)
        write_checkpoint(name, fine_tune(base, seed) if seed else base, config=config, shards=2)
    Path("recipe.yaml").write_text(RECIPE)
    Path("mixture.yaml").write_text(MIXTURE)
    np.savez("data.npz", input_ids=np.ones((2, 3), dtype=int), labels=np.arange(2))
    printed: dict[str, jsonschema.Draft202012Validator] = {}
    for line in LINES:
        done = run(*line, "--json")
        assert done.code == 0, (line, done.stderr)
        words = line[:2] if " ".join(line[:2]) in DOCUMENTS else line[:1]
        command = " ".join(words)
        if command not in printed:  # the document of each line has been held to what is published by now
            schema = json.loads(run("schema", "--of", command).stdout)
            jsonschema.Draft202012Validator.check_schema(schema)
            printed[command] = jsonschema.Draft202012Validator(schema)
        printed[command].validate(done.document())
        assert not printed[command].is_valid({**_mapping(done.document()), "unknown": 1}), line


def _mapping(document: object) -> dict[str, object]:
    return document if isinstance(document, dict) else {}


def test_what_has_no_schema_is_named(run) -> None:
    assert "did you mean 'compare'" in run("schema", "--of", "compar").stderr
    assert "prints no JSON" in run("schema", "--of", "convert").stderr
