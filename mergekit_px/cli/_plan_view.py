"""A plan for people, drawn from its report; and the report itself for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergekit_px.checkpoint.side_files import WEIGHTS
from mergekit_px.cli._output import Column, Output
from mergekit_px.cli._units import show_bytes, show_count, show_seconds
from mergekit_px.errors import UsageError

if TYPE_CHECKING:
    from mergekit_px.execute.bandwidth import Bandwidth
    from mergekit_px.plan.model import Plan

_SHOWN = 20
"""Rows of a long list that people are shown; ``--json`` has them all."""


def show_plan(plan: Plan, output: Output, workers: Sequence[int] = ()) -> None:
    """Print the plan: what is read, computed and written; memory, disk, time; that of several workers too."""
    from mergekit_px.plan.report import PlanDocument, plan_report
    from mergekit_px.plan.schedule import schedules

    bandwidth = _bandwidth(plan)
    if workers and bandwidth is None:
        raise UsageError("--workers: the disk of the output cannot be measured", hint="give another with -o")
    report = plan_report(
        plan,
        seconds_bound=None if bandwidth is None else bandwidth.bound(plan.bytes_read, plan.bytes_written),
        schedules=() if bandwidth is None else schedules(plan, workers, bandwidth.bound),
    )
    output.document(report, PlanDocument)
    if output.mode == "quiet":
        return
    _inputs(report, output)
    _steps(report, output)
    _tensors(report, output)
    _output(report, output)
    _cost(report, output)
    _schedules(report, output)
    if report["notes"]:
        output.heading("Notes")
        for note in report["notes"]:
            output.text(f"- {note}")


def _bandwidth(plan: Plan) -> Bandwidth | None:
    """Of the output's file system; measured now if that was not done lately, None if it cannot be."""
    from mergekit_px.execute import bandwidth

    if plan.output is None:
        return None
    known = bandwidth.remembered(plan.output)
    if known is None:
        try:
            known = bandwidth.measure(bandwidth.existing_parent(plan.output))
        except OSError:
            return None
        bandwidth.remember(plan.output, known)
    return known


def _inputs(report: Mapping[str, Any], output: Output) -> None:
    output.heading("Inputs")
    columns = [
        Column("name"),
        Column("model"),
        Column("commit", essential=False),
        Column("dtype"),
        Column("tensors", "right", essential=False),
        Column("parameters", "right", essential=False),
        Column("size", "right"),
    ]
    rows = [
        (
            name,
            entry["reference"] + (" (task vector)" if entry["kind"] == "task vector" else ""),
            entry["commit"][:12] if entry["commit"] else "local",
            _dtypes(entry["dtypes"]),
            entry["tensors"],
            show_count(entry["parameters"]),
            show_bytes(entry["bytes"]),
        )
        for name, entry in report["inputs"].items()
    ]
    output.table(columns, rows)
    for name, entry in report["artefacts"].items():
        output.text(f"with the {entry['kind']} of {name} (sha256 {entry['sha256'][:12]})")


def _steps(report: Mapping[str, Any], output: Output) -> None:
    output.heading("Steps")
    rows = []
    for name, step in report["steps"].items():
        details = [f"base {step['base']}"] if step.get("base") else []
        details += [f"{key} {_value(value)}" for key, value in step.get("params", {}).items()]
        details += [f"like {step['like']}"] if step.get("like") else []
        details += [f"{len(step['rules'])} rules"] if step.get("rules") else []
        details += [f"{len(step['slices'])} slices"] if step.get("slices") else []
        rows.append((name, step["method"], _value(step.get("sources", "")), ", ".join(details)))
    output.table([Column("step"), Column("method"), Column("sources"), Column("with")], rows)


def _tensors(report: Mapping[str, Any], output: Output) -> None:
    tensors = report["tensors"]
    output.heading("Tensors")
    output.pairs(
        [
            ("merged", tensors["merged"]),
            ("copied", tensors["copied"] or None),
            ("converted", tensors["converted"] or None),
            ("in every input", tensors["in_all_inputs"]),
            ("dropped", len(tensors["dropped"]) or None),
            ("parameters", show_count(report["parameters"])),
            ("dtypes", _dtypes(report["dtypes"])),
            ("tied embeddings", {True: "yes", False: "no"}.get(report["tied_embeddings"])),
        ]
    )
    for name, missing in tensors["in_some_inputs"].items():
        output.text(f"not in {name}: {_listed(missing)}")
    dropped = tensors["dropped"]
    if dropped:
        output.heading("Dropped")
        rows = [(entry["input"], entry["tensor"], entry["reason"]) for entry in dropped[:_SHOWN]]
        output.table([Column("input"), Column("tensor"), Column("why")], rows)
        if len(dropped) > _SHOWN:
            output.text(f"and {len(dropped) - _SHOWN} more (all with --json)")


def _output(report: Mapping[str, Any], output: Output) -> None:
    output.heading("Output")
    left_behind = {file: why for file, why in report["left_behind"].items() if why != WEIGHTS}
    shards = report["output"]["shards"]
    largest = max((shard["bytes"] for shard in shards), default=0)
    files = shards[0]["file"] if len(shards) == 1 else f"{len(shards)} shards, the largest {show_bytes(largest)}"
    output.pairs(
        [
            ("file" if report["output"]["one_file"] else "folder", report["output"]["path"]),
            ("holds", report["kind"]),
            ("files", files),
            ("config from", report["config_from"]),
            ("tokenizer from", report["tokenizer_from"]),
            ("also copied", _listed(list(report["side_files"])) or None),
            ("left behind", _listed([f"{file} ({why})" for file, why in left_behind.items()]) or None),
        ]
    )


def _cost(report: Mapping[str, Any], output: Output) -> None:
    memory = report["memory"]
    needs = f"{show_bytes(memory['peak_bytes'])} with {memory['workers']} workers"
    if memory["largest_tensor"]:
        needs += f", {show_bytes(memory['largest_bytes'])} of it for {memory['largest_tensor']}"
    bound = report["seconds_bound"]
    output.heading("Cost")
    output.pairs(
        [
            ("peak memory", needs),
            ("disk", show_bytes(report["bytes_written"])),
            ("bytes moved", f"{show_bytes(report['bytes_read'])} read, {show_bytes(report['bytes_written'])} written"),
            ("time", None if bound is None else f"{show_seconds(bound)} at least, by this machine's bandwidth"),
        ]
    )


def _schedules(report: Mapping[str, Any], output: Output) -> None:
    if not report["schedules"]:
        return
    output.heading("Workers")
    columns = ("workers", "busy", "most read", "most written", "time at least", "balance")
    rows = [
        (
            schedule["workers"],
            schedule["busy"],
            show_bytes(schedule["bytes_read"]),
            show_bytes(schedule["bytes_written"]),
            show_seconds(schedule["seconds"]),
            f"{schedule['balance']:.0%}",
        )
        for schedule in report["schedules"]
    ]
    output.table([Column(name, "right") for name in columns], rows)
    output.text("each on a machine with the bandwidth of this one, to storage that gives that to all of them")


def _dtypes(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_value(inner)}" if inner is not None else name for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(_value(inner) for inner in value)
    return str(value)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
