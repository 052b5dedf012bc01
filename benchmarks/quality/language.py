"""Three fine-tunes of a language model on three domains of text, merged: held-out loss and next-token accuracy."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from benchmarks.quality.experiment import Experiment, Scores
from benchmarks.quality.lab import Lab
from benchmarks.quality.language_model import BATCH, TOKENS, LanguageModel, base_model
from benchmarks.quality.text_domains import DOMAINS, texts

COUNTS = {"train": 40, "validation": 8, "test": 16}
"""Texts of each domain; a few are too short and fall out."""
STEPS = 20

Line = Sequence[str]


class Merges:
    """The fine-tunes of one seed and what is made of them."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._base = base_model(lab.folder.parent / "base")
        self._model = LanguageModel(self._base)
        self._sources = [str(self._tuned(domain)) for domain in DOMAINS]

    def rows(self) -> Mapping[str, Callable[[], None]]:
        """What sets the model to the weights of each row of the table."""
        merged = {
            "average": ("linear",),
            "task arithmetic": ("task-arithmetic",),
            "task arithmetic, scale 0.5": ("task-arithmetic", "--scale", "0.5"),
            "TIES": ("ties",),
            "TSV-M": ("tsv-m",),
            "svd, 100%": ("svd", "--top-k", "100%"),
        }
        made: dict[str, Callable[[], None]] = {"base": partial(self._load, str(self._base))}
        made["average"] = partial(self._merge, merged["average"])
        made["ofasd"] = partial(self._ofasd, "tensor")
        made["svd, then tune"] = partial(self._tune, "--orthogonalise")
        made["svd plain, then tune"] = partial(self._tune, "--no-orthogonalise")
        made |= {title: partial(self._merge, line) for title, line in merged.items()}
        made |= {f"fine-tune on {name}": partial(self._alone, n) for n, name in enumerate(DOMAINS)}
        made["LoRA from the average, same labels"] = partial(self._continued, merged["average"], BATCH)
        made["the same, all texts in each step"] = partial(self._continued, merged["average"], 3 * COUNTS["validation"])
        made["LoRA from svd, 100%, the same"] = partial(self._continued, merged["svd, 100%"], 3 * COUNTS["validation"])
        made["ofasd, one coefficient a source"] = partial(self._ofasd, "model")
        return made

    def scores(self, title: str, make: Callable[[], None]) -> list[list[list[float]]]:
        """Loss and accuracy of each test text, (domains, 2, texts)."""

        def measured() -> list[list[list[float]]]:
            make()
            found = [self._model.scores(self._tokens(domain, "test")).tolist() for domain in DOMAINS]
            shown = [f"{mean(losses):.3f}" for losses, _ in found]
            print(f"  {title}, seed {self._lab.seed}: {' '.join(shown)}", file=sys.stderr, flush=True)
            return found

        return self._lab.remembered(title, measured)

    def _tokens(self, domain: str, part: str) -> Tensor:
        return self._model.tokens(texts(domain, part, COUNTS[part], self._lab.seed))

    def _tuned(self, domain: str) -> Path:
        output = self._lab.folder / domain
        if not (output / "adapter_config.json").exists():
            self._load(str(self._base))
            self._model.fine_tune(self._tokens(domain, "train"), STEPS, self._lab.seed, output)
            print(f"  tuned on {domain}, seed {self._lab.seed}", file=sys.stderr, flush=True)
        return output

    def _load(self, checkpoint: str) -> None:
        self._model.load(checkpoint)

    def _merge(self, line: Line) -> None:
        inputs = ("--base", str(self._base), "--sources", *self._sources)
        self._load(self._lab.write("merged", *line, *inputs))

    def _alone(self, number: int) -> None:
        inputs = ("--base", str(self._base), "--sources", self._sources[number])
        self._load(self._lab.write("merged", "task-arithmetic", *inputs))

    def _data(self) -> str:
        """The validation texts of all domains, from which every learner learns and chooses."""
        path = self._lab.folder / "few.jsonl"
        few = [text for domain in DOMAINS for text in texts(domain, "validation", COUNTS["validation"], self._lab.seed)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in few))
        return str(path)

    def _tune(self, start: str) -> None:
        learning = (start, "--tune", self._data(), "--tune-steps", str(STEPS), "--max-length", str(TOKENS))
        inputs = ("--base", str(self._base), "--sources", *self._sources)
        tuned = self._lab.write("tuned", "svd", "--top-k", "100%", *learning, *inputs)
        self._load(str(Path(tuned) / "model"))

    def _ofasd(self, granularity: str) -> None:
        learning = ["--data", self._data(), "--max-length", str(TOKENS), "--granularity", granularity]
        learning += ["--steps", str(STEPS), "--batch", str(BATCH), "--evaluate-every", "10", "--controls", "none"]
        inputs = ("--base", str(self._base), "--sources", *self._sources)
        found = self._lab.write("coefficients", "ofasd", *inputs, *learning, "--test", "0.02")
        self._load(self._lab.write("merged", "run", str(Path(found) / "recipe.yaml")))

    def _continued(self, start: Line, batch: int) -> None:
        """What the same texts are worth without any learner of merges."""
        inputs = ("--base", str(self._base), "--sources", *self._sources)
        merged = self._lab.write("start", *start, *inputs)
        self._load(merged)
        few = torch.cat([self._tokens(domain, "validation") for domain in DOMAINS])
        output = self._lab.folder / "continued"
        self._model.fine_tune(few, STEPS, self._lab.seed, output, batch)
        self._load(self._lab.write("merged", "task-arithmetic", "--base", merged, "--sources", str(output)))


def language(lab: Lab) -> Scores:
    """Mean over the domains of each row, its standard error beside the average's on the same texts, and each domain."""
    merges = Merges(lab)
    found = {title: torch.tensor(merges.scores(title, make)) for title, make in merges.rows().items()}
    scores: Scores = {}
    for title, values in found.items():
        beside = values - found["average"]
        error = (beside.var(-1) / beside.shape[-1]).sum(0).sqrt() / len(DOMAINS)
        for place, name in enumerate(("loss", "accuracy")):
            scores[f"{title}, {name}"] = float(values[:, place].mean())
            scores[f"({title}, {name} beside the average)"] = float(beside[:, place].mean())
            scores[f"({title}, {name}, error)"] = float(error[place])
            scores |= {
                f"({title}, {name} on {domain})": float(value)
                for domain, value in zip(DOMAINS, values[:, place].mean(-1), strict=True)
            }
    return scores


def table(rows: Sequence[Scores]) -> str:
    """Losses and accuracies; the error is that of the texts within a seed, averaged over the seeds."""
    head = f"| | loss | beside the average | accuracy | beside the average | {' | '.join(DOMAINS)} |"
    lines = [head, "| --- |" + " ---: |" * (4 + len(DOMAINS))]
    for title in [name.removesuffix(", loss") for name in rows[0] if name.endswith(", loss")]:

        def value(name: str) -> float:
            return mean(row[name] for row in rows)

        cells = []
        for name, digits in (("loss", 3), ("accuracy", 1)):
            error = value(f"({title}, {name}, error)") / len(rows) ** 0.5
            cells.append(f"{value(f'{title}, {name}'):.{digits}f}")
            cells.append(f"{value(f'({title}, {name} beside the average)'):+.{digits}f} ± {error:.{digits}f}")
        cells += [f"{value(f'({title}, loss on {domain})'):.3f}" for domain in DOMAINS]
        lines.append(f"| {' | '.join([title, *cells])} |")
    return "\n".join(lines)


EXPERIMENTS = (Experiment("language", language, table=table, by_default=False),)
