from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import ModelCard

from mergekit_px.hub.card import CardInput, CardMethod, merged_license, model_card

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RECIPE = "pxmerge: 1\nmodels:\n  base: org/base@main\n  math: /home/someone/models/math-ft\n  code: ../code\n"
BASE = CardInput("base", "org/base", commit=COMMIT, license="apache-2.0", is_base=True)
MATH = CardInput("math", "/home/someone/models/math-ft", weight="0.6", license="apache-2.0")
CODE = CardInput("code", "org/code", commit=COMMIT[::-1], weight="0.4", license="apache-2.0")
TIES = CardMethod(
    "ties",
    summary="Trim, elect signs, merge",
    paper="2306.01708",
    parameters={"density": "0.5", "lambda": "1.0"},
    meanings={"density": "Share kept,\n``a | b``."},
)


def card(**changes: Any) -> str:
    given: dict[str, Any] = {
        "title": "merged",
        "inputs": [BASE, MATH, CODE],
        "methods": [TIES],
        "recipe": RECIPE,
        "lock_hash": "ab" * 32,
        "version": "1.2.3",
    }
    return model_card(**(given | changes))


def test_the_front_matter_is_what_the_hub_reads() -> None:
    data = ModelCard(card()).data.to_dict()
    assert data == {
        "base_model": ["org/base", "org/code"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": "apache-2.0",
        "tags": ["merge", "pxmerge"],
    }


def test_optional_front_matter() -> None:
    data = ModelCard(card(library_name="peft", pipeline_tag="text-generation", language=["en", "de"])).data.to_dict()
    assert (data["library_name"], data["pipeline_tag"], data["language"]) == ("peft", "text-generation", ["en", "de"])


def test_a_merge_of_local_folders_names_no_base_model() -> None:
    data = ModelCard(card(inputs=[MATH])).data.to_dict()
    assert "base_model" not in data and "base_model_relation" not in data


def test_the_body_holds_what_a_reader_needs() -> None:
    text = card(notes=["The mean of the sources\nserves as the centre."])
    assert "# merged" in text
    assert "[arXiv:2306.01708](https://arxiv.org/abs/2306.01708)" in text
    assert "| `density` | 0.5 | Share kept, `a \\| b`. |" in text
    assert "| `lambda` | 1.0 | - |" in text
    assert f"| base (base) | [org/base](https://huggingface.co/org/base) | [`{COMMIT[:12]}`]" in text
    assert "| math | `math-ft` (local) | - | 0.6 | apache-2.0 |" in text
    assert "- The mean of the sources serves as the centre." in text
    assert "ab" * 32 in text
    assert "pxmerge run pxmerge.yaml --locked" in text
    assert "the commits of the table" in text
    assert "pxmerge 1.2.3" in text


def test_no_path_of_this_machine_is_told() -> None:
    recipe = RECIPE + "  a: '~/private/a'\n  b: \"C:\\\\Users\\\\me\\\\b\"\n  c: {model: /srv/x/c, adapter: /srv/x/d}\n"
    text = card(recipe=recipe)
    for secret in ("/home", "someone", "~", "private/", "Users", "/srv"):
        assert secret not in text, secret
    assert "math: math-ft" in text
    assert "c: {model: c, adapter: d}" in text


def test_the_rest_of_the_recipe_is_left_as_it_is() -> None:
    recipe = 'pxmerge: 1\nmodels: {a: org/name@refs/pr/3, b: ../near, c: "https://huggingface.co/x/y"}\n'
    recipe += 'merge: {method: linear, rules: [{match: "*.mlp/*", layers: 8-15}]}  # 1 / 2\n'
    assert f"```yaml\n{recipe}```" in card(recipe=recipe)


def test_a_fence_in_the_recipe_does_not_end_the_fence() -> None:
    text = card(recipe="# ```\n# ````\npxmerge: 1\n")
    assert "`````yaml\n# ```\n# ````\npxmerge: 1\n`````" in text


@pytest.mark.parametrize(
    ("licenses", "merged"),
    [
        (["mit", "mit"], "mit"),
        (["mit", "apache-2.0"], "other"),
        (["mit", None], "other"),
        ([None, None], "other"),
        (["other", "other"], "other"),
        (["other (acme)", "other (acme)"], "other"),
    ],
)
def test_licences(licenses: list[str | None], merged: str) -> None:
    inputs = [CardInput(f"m{number}", f"org/m{number}", COMMIT, license=each) for number, each in enumerate(licenses)]
    assert merged_license(inputs) == merged
    text = card(inputs=inputs)
    assert ModelCard(text).data.license == (merged if any(licenses) else None)
    if merged == "other":
        for number, each in enumerate(licenses):
            assert f"- org/m{number}: {each or 'unknown'}" in text
    else:
        assert "## Licences" not in text


def test_text_of_others_breaks_neither_table_nor_yaml() -> None:
    odd = CardInput("a|b", "org/x", COMMIT, license="li: cense\n---\nevil")
    text = card(inputs=[odd], title="two\nlines: yes")
    assert "| a\\|b | [org/x]" in text
    assert "# two lines: yes" in text
    assert ModelCard(text).data.license == "li: cense --- evil"


def test_the_same_merge_gives_the_same_card() -> None:
    assert card() == card()
