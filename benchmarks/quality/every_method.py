"""Every method that needs no data, on eight fine-tunes: accuracy at scale 1 and at the best scale, and the cost."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Literal, Protocol, TypedDict

from benchmarks.quality.eight_tasks import TASKS, EightTasks
from benchmarks.quality.experiment import Experiment, Scores
from benchmarks.quality.lab import Lab, State, added, difference
from benchmarks.quality.text_tasks import TextTasks
from mergekit_px.methods import load_methods
from mergekit_px.methods.declare import method_slug

SCALES = (0.15, 0.3, 0.6, 1.0, 1.5, 2.2, 3.3)
"""Of the whole update; the best is sought from 1 on, uphill."""

ALIKE = {"fednova": "linear"}
"""Without further knowledge of the sources the same as another."""


@dataclass(frozen=True)
class Variant:
    """A line of `pxmerge`, which may correct what another one made."""

    line: Sequence[str]
    corrects: str | None = None
    """Title of the line whose result is the first source."""
    alone: bool = False
    """Whether that is the only source."""


def _calibrated(title: str, *options: str) -> Variant:
    return Variant(("svc", *options), corrects=title)


VARIANTS: Mapping[str, Variant] = {
    "svd 100%": Variant(("svd", "--top-k", "100%")),
    "svd 100%, svc": Variant(("svd", "--top-k", "100%", "--calibrate", "svc")),
    "tsv_m": Variant(("tsv-m",)),
    "iso_c": Variant(("iso-c",)),
    "iso_cts": Variant(("iso-cts",)),
    "dc_merge": Variant(("dc-merge",)),
    "task_arithmetic": Variant(("task-arithmetic",)),
    "ties": Variant(("ties",)),
    "wudi": Variant(("wudi",)),
    "tsv_m, svc": _calibrated("tsv_m"),
    "tsv_m, svc with floor 1": _calibrated("tsv_m", "--floor", "1"),
    "task_arithmetic, svc": _calibrated("task_arithmetic"),
    "ties, svc": _calibrated("ties"),
    "iso_c, svc": _calibrated("iso_c"),
    "svd 50%, svc": Variant(("svd", "--top-k", "50%", "--calibrate", "svc")),
    "svd 20%, svc": Variant(("svd", "--top-k", "20%", "--calibrate", "svc")),
    "svd 20%": Variant(("svd", "--top-k", "20%")),
    "svd 20%, plain": Variant(("svd", "--top-k", "20%", "--no-orthogonalise")),
    "wudi, closed": Variant(("wudi", "--solver", "closed")),
    "wudi, closed, both sides": Variant(("wudi", "--solver", "closed", "--sides", "both")),
    "svd 100%, recover": Variant(("svd", "--top-k", "100%", "--recover", "0.6")),
    "iso_c, recover": Variant(("iso-c", "--recover", "0.6")),
    "wudi, closed, both sides, recover": Variant(("wudi", "--solver", "closed", "--sides", "both", "--recover", "0.6")),
    "task_arithmetic, svc, recover": _calibrated("task_arithmetic", "--recover", "0.6"),
    "ties, boosted": Variant(("subspace-boosting",), corrects="ties", alone=True),
}
"""What is asked for besides every method with its defaults; first what is looked at first."""


def variants(wanted: Sequence[str] | None = None) -> dict[str, Variant]:
    """Every variant, then every method that takes eight sources and no data, with its defaults; or the wanted ones.

    Raises:
        ValueError: a title that there is not.
    """
    found = dict(VARIANTS)
    for name, method in load_methods().items():
        most = method.sources[1] or len(TASKS)
        fits = method.origin.startswith("mergekit_px") and method.family not in ("statistics", "building block")
        if fits and most >= len(TASKS) and name != "svc" and name not in ALIKE:
            found.setdefault(name, Variant((method_slug(name),)))
    if wanted is None:
        return found
    if unknown := [title for title in wanted if title not in found]:
        raise ValueError(f"no such method: {', '.join(unknown)}; there are {', '.join(found)}")
    return {title: found[title] for title in wanted}


class Result(TypedDict):
    """Of one method at one seed; accuracies in percent of the fine-tunes', by task."""

    each: list[float]
    best: list[float]
    """At the best scale; the same where that was not looked for."""
    scale: float
    seconds: float
    mib: float


class Tasks(Protocol):
    @property
    def base(self) -> State: ...

    def each(self, state: State, part: str = "test") -> list[float]: ...


class Measured:
    """The methods on the fine-tunes of one seed."""

    def __init__(self, lab: Lab, tasks: Tasks, base: str, sources: Sequence[str]) -> None:
        self._lab, self._tasks, self._base, self._sources = lab, tasks, base, sources

    def scores(self, chosen: Mapping[str, Variant]) -> Scores:
        found: Scores = {"pre-trained": mean(self._pretrained("test"))}
        for title, variant in chosen.items():
            name = title if self._lab.scales else f"{title}, at scale 1"
            result = self._lab.remembered(name, lambda title=title, variant=variant: self._result(title, variant))
            found[title] = mean(result["each"])
            found[f"{title}, worst task"] = min(result["each"])
            found[f"{title}, best scale"] = mean(result["best"])
            found |= {f"({title}, {name})": result[name] for name in ("scale", "seconds", "mib")}
        return found

    def _pretrained(self, part: str) -> list[float]:
        found: list[float] = self._lab.remembered(
            f"pre-trained {part}", lambda: self._tasks.each(self._tasks.base, part)
        )
        return found

    def _result(self, title: str, variant: Variant) -> Result:
        merged, seconds, mib = self._merged(variant)
        update = difference(merged, self._tasks.base)

        def each(scale: float, part: str) -> list[float]:
            return self._tasks.each(added(self._tasks.base, [update], scale), part)

        scale = self._best_scale(each) if self._lab.scales else 1.0
        whole = each(1.0, "test")
        print(f"  {title}, seed {self._lab.seed}: {mean(whole):.1f}", file=sys.stderr, flush=True)
        best = whole if scale == 1 else each(scale, "test")
        return Result(each=whole, best=best, scale=scale, seconds=seconds, mib=mib)

    def _best_scale(self, each: Callable[[float, str], list[float]]) -> float:
        """From 1 on to the smaller or to the larger ones, as long as it gets better or is below the base."""
        below = mean(self._pretrained("validation"))
        found = {1.0: mean(each(1.0, "validation"))}
        smaller, larger = [s for s in reversed(SCALES) if s < 1], [s for s in SCALES if s > 1]
        for way in (smaller, larger if found[1.0] >= below else []):
            before = found[1.0]
            for scale in way:
                found[scale] = mean(each(scale, "validation"))
                if found[scale] < before and before >= below:
                    break
                before = found[scale]
        return max(found, key=lambda scale: found[scale])

    def _merged(self, variant: Variant) -> tuple[State, float, float]:
        """The result of a line, the processor seconds, and the MiB that it took beside what was held before."""
        sources, seconds, mib = list(self._sources), 0.0, 0.0
        if variant.corrects is not None:
            merged, seconds, mib = self._merged(VARIANTS[variant.corrects])
            sources = [self._lab.save("corrected", merged), *([] if variant.alone else sources)]
        before, started = _resident(), time.process_time()
        Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
        merged = self._lab.merge(*variant.line, "--base", self._base, "--sources", *sources)
        return merged, seconds + time.process_time() - started, max(mib, _resident("VmHWM") - before)


def _resident(which: str = "VmRSS") -> float:
    """MiB of this process, now or at most."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{which}:")[1].split()[0]) / 1024


def table(rows: Sequence[Scores]) -> str:
    """The methods, best at scale 1 first, with standard errors over the seeds."""
    titles = [title for title in rows[0] if f"{title}, best scale" in rows[0]]

    def cells(title: str) -> str:
        found = [_with_error([row[name] for row in rows]) for name in (title, f"{title}, best scale")]
        means = {name: mean(row[f"({title}, {name})"] for row in rows) for name in ("seconds", "mib")}
        scales = ", ".join(f"{row[f'({title}, scale)']:g}" for row in rows)
        worst = f"{mean(row[f'{title}, worst task'] for row in rows):.1f}"
        cost = [f"{means['seconds']:.1f}", f"{means['mib']:.0f}"]
        return f"| {' | '.join([title, found[0], worst, found[1], scales, *cost])} |"

    ordered = sorted(titles, key=lambda title: -mean(row[title] for row in rows))
    head = "| | scale 1 | worst task | best scale | scales | seconds | MiB |\n|" + " --- |" + " ---: |" * 6
    first = f"| pre-trained encoder | {_with_error([row['pre-trained'] for row in rows])} | | | | | |"
    return "\n".join([head, first, *map(cells, ordered)])


def _with_error(values: Sequence[float]) -> str:
    error = f" ± {stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{error}"


def digits(lab: Lab, rate: float) -> Scores:
    tasks = EightTasks(lab, rate)
    base, sources = lab.save("base", tasks.base), [lab.save(name, state) for name, state in tasks.tuned.items()]
    return Measured(lab, tasks, base, sources).scores(variants(lab.methods))


def text(lab: Lab, kind: Literal["full", "lora"]) -> Scores:
    tasks = TextTasks(lab, kind)
    found = {f"(accuracy, {name})": own for name, own in zip(tasks.names, tasks.accuracy(), strict=True)}
    return found | Measured(lab, tasks, tasks.base_folder, tasks.sources).scores(variants(lab.methods))


EXPERIMENTS = (
    Experiment("digits", partial(digits, rate=3e-4), table=table, by_default=False),
    Experiment("digits-far", partial(digits, rate=1e-3), table=table, by_default=False),
    Experiment("text", partial(text, kind="full"), table=table, by_default=False),
    Experiment("text-lora", partial(text, kind="lora"), table=table, by_default=False),
)
