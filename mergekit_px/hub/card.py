"""The model card of a merge: text from plain data, no network, no paths of the machine it was made on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import yaml

from mergekit_px.escaping import escaped, escaped_line

_REPOSITORY = "https://huggingface.co"
_LOCAL_PATH = re.compile(r"(?<![\w.:/*\\~-])(?:(?:~[\w-]*)?/|[A-Za-z]:[/\\])[^\s'\",\]}#]+")


@dataclass(frozen=True)
class CardInput:
    """One input of the merge.

    Attributes:
        name: its name in the recipe.
        source: ``org/name`` on the Hub, or the local path as the recipe writes it.
        commit: the pinned commit; None for a local input.
        weight: as the recipe gives it; None where it has none.
        license: what its card says; None if unknown.
        is_base: whether the merge takes its differences from this one.
    """

    name: str
    source: str
    commit: str | None = None
    weight: str | None = None
    license: str | None = None
    is_base: bool = False

    @property
    def is_on_hub(self) -> bool:
        return self.commit is not None

    @property
    def shown(self) -> str:
        """The Hub id, or the last part of a local path."""
        return self.source if self.is_on_hub else _last_part(self.source)


@dataclass(frozen=True)
class CardMethod:
    """One method used: its name, a line on what it does, its paper and parameters.

    Attributes:
        paper: an arXiv number (``2306.01708``) or a web address.
        parameters: what each was, by name.
        meanings: what they mean, by name; may lack some.
    """

    name: str
    summary: str = ""
    paper: str | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    meanings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CardArtefact:
    """A small file that a parameter names.

    Attributes:
        source: its path, as the recipe writes it.
        kind: what it holds.
    """

    source: str
    kind: str
    sha256: str


def model_card(
    *,
    title: str,
    inputs: Sequence[CardInput],
    methods: Sequence[CardMethod],
    recipe: str,
    lock_hash: str,
    version: str,
    artefacts: Sequence[CardArtefact] = (),
    notes: Sequence[str] = (),
    library_name: str = "transformers",
    pipeline_tag: str | None = None,
    language: Sequence[str] = (),
) -> str:
    """``README.md`` of a merged model: front matter that the Hub reads, and a body for people.

    Args:
        recipe: the whole recipe as YAML; paths of the local machine in it are cut to their last part.
        artefacts: small files that the merge was made with.
        lock_hash: the plan's hash as ``pxmerge.lock.json`` records it, in hex.
        version: of pxmerge.
        notes: what was said aloud on the way, one sentence each.
    """
    parts = [
        f"---\n{_front_matter(inputs, library_name, pipeline_tag, language)}---",
        f"# {_line(title)}",
        f"{_opening(inputs)}, made with pxmerge {version} from the recipe below.",
        _methods(methods),
        _inputs(inputs),
        _artefacts(artefacts),
        _licences(inputs),
        _notes(notes),
        _reproduction(recipe, lock_hash, inputs),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _opening(inputs: Sequence[CardInput]) -> str:
    """What was merged; the base is what the others were fine-tuned from, and is not counted."""
    merged = [card_input for card_input in inputs if not card_input.is_base] or inputs
    base = [card_input for card_input in inputs if card_input.is_base and card_input not in merged]
    into = f" with {_line(base[0].shown)} as their base" if len(base) == 1 else ""
    return f"A merge of {_count(len(merged), 'model')}{into}"


def merged_license(inputs: Sequence[CardInput]) -> str:
    """The licence id for the front matter: what all inputs agree on, else ``other``. This decides no law."""
    found = {card_input.license for card_input in inputs}
    agreed = found.pop() if len(found) == 1 else None
    return _line(agreed) if agreed is not None and not agreed.startswith("other") else "other"


def _front_matter(
    inputs: Sequence[CardInput], library_name: str, pipeline_tag: str | None, language: Sequence[str]
) -> str:
    data: dict[str, object] = {}
    base_models = list(dict.fromkeys(card_input.source for card_input in inputs if card_input.is_on_hub))
    if base_models:
        data |= {"base_model": base_models, "base_model_relation": "merge"}
    data["library_name"] = library_name
    if pipeline_tag is not None:
        data["pipeline_tag"] = pipeline_tag
    if language:
        data["language"] = list(language)
    if any(card_input.license for card_input in inputs):
        data["license"] = merged_license(inputs)
        if data["license"] == "other":
            data["license_name"] = "those-of-the-merged-models"
    data["tags"] = ["merge", "pxmerge"]
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _methods(methods: Sequence[CardMethod]) -> str:
    return "\n\n".join(["## Method" if len(methods) == 1 else "## Methods", *map(_method, methods)])


def _method(method: CardMethod) -> str:
    head = f"**{_line(method.name)}**"
    if method.summary:
        head += f": {_line(method.summary)}"
    if method.paper is not None:
        head += f" ({_paper(method.paper)})"
    lines = [head]
    if method.parameters:
        rows = ["| parameter | value | meaning |", "|---|---|---|"]
        for name, value in method.parameters.items():
            cells = [f"`{name}`", value, method.meanings.get(name, "").replace("``", "`")]
            rows.append("| " + " | ".join(map(_cell, cells)) + " |")
        lines.append("\n".join(rows))
    return "\n\n".join(lines)


def _paper(paper: str) -> str:
    if paper.startswith(("http://", "https://")):
        return f"[paper]({paper})"
    number = paper.removeprefix("arXiv:")
    return f"[arXiv:{number}](https://arxiv.org/abs/{number})"


def _inputs(inputs: Sequence[CardInput]) -> str:
    rows = ["| name | model | commit | weight | licence |", "|---|---|---|---|---|"]
    for card_input in inputs:
        name = f"{card_input.name} (base)" if card_input.is_base else card_input.name
        cells = [name, _model(card_input), _commit(card_input), card_input.weight, card_input.license]
        rows.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "## Inputs\n\n" + "\n".join(rows)


def _artefacts(artefacts: Sequence[CardArtefact]) -> str:
    if not artefacts:
        return ""
    rows = ["| file | holds | sha256 |", "|---|---|---|"]
    for artefact in artefacts:
        cells = [f"`{escaped_line(_last_part(artefact.source))}`", artefact.kind, f"`{artefact.sha256}`"]
        rows.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(rows)


def _model(card_input: CardInput) -> str:
    if card_input.is_on_hub:
        return f"[{card_input.source}]({_REPOSITORY}/{card_input.source})"
    return f"`{escaped_line(card_input.shown)}` (local)"


def _commit(card_input: CardInput) -> str | None:
    if card_input.commit is None:
        return None
    return f"[`{card_input.commit[:12]}`]({_REPOSITORY}/{card_input.source}/tree/{card_input.commit})"


def _licences(inputs: Sequence[CardInput]) -> str:
    if merged_license(inputs) != "other":
        return ""
    lines = [f"- {_line(each.shown)}: {_line(each.license or 'unknown')}" for each in inputs]
    return "\n".join(
        ["## Licences", "", "The inputs do not share one known licence; each one's terms apply:", "", *lines]
    )


def _notes(notes: Sequence[str]) -> str:
    return "\n".join(["## Notes", "", *(f"- {_line(note)}" for note in notes)]) if notes else ""


def _reproduction(recipe: str, lock_hash: str, inputs: Sequence[CardInput]) -> str:
    local = any(not card_input.is_on_hub for card_input in inputs)
    pinned = any(card_input.is_on_hub for card_input in inputs)
    needs = " Branches may move on: what is merged again is the commits of the table." if pinned else ""
    needs += " The local inputs are needed under the paths that the recipe gives." if local else ""
    return "\n\n".join(
        [
            "## How to reproduce",
            "Equal inputs give equal bytes. `pxmerge.yaml` is the recipe, `pxmerge.lock.json` pins the commit and"
            f" the hash of every input and output file; the plan's hash is `{lock_hash}`.{needs}",
            _fenced("pxmerge run pxmerge.yaml --locked -o merged\npxmerge verify merged", "sh"),
            "## Recipe",
            _fenced(_without_local_paths(recipe, inputs), "yaml"),
        ]
    )


def _fenced(text: str, language: str) -> str:
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{escaped(text.strip())}\n{fence}"


def _without_local_paths(text: str, inputs: Sequence[CardInput]) -> str:
    """Absolute paths in ``text`` cut to their last part: the folders of this machine are nobody's business."""
    for card_input in inputs:
        if not card_input.is_on_hub and _LOCAL_PATH.match(card_input.source):
            text = text.replace(card_input.source, card_input.shown)
    return _LOCAL_PATH.sub(lambda match: _last_part(match.group()), text)


def _last_part(path: str) -> str:
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..", "~")]
    return parts[-1] if parts else "."


def _cell(text: str | None) -> str:
    return _line(text).replace("|", "\\|") if text else "-"


def _line(text: str) -> str:
    return escaped_line(" ".join(text.split()))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
