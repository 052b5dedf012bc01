"""All runs of a plan: every transfer under every seed, with its controls; then checkpoints and the report.

<output>/<transfer>/target, source    trained models of the first seed (source: modes joint and mutual)
<output>/<transfer>/last-good         what is left of a run that diverged
<output>/report.json, .md, .png       the comparison
<output>/plan.yaml                    the plan
<output>/.transfer/                   states and results of an unfinished run
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.destination import Mode
from mergekit_px.checkpoint.fingerprint import fingerprint
from mergekit_px.checkpoint.hashing import file_sha256
from mergekit_px.checkpoint.index import LARGEST_INDEX
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.errors import DivergedError, InputError, UsageError
from mergekit_px.learn.artefact import write_text
from mergekit_px.learn.data import Examples
from mergekit_px.learn.data_files import data_sha256
from mergekit_px.learn.folder import working_folder
from mergekit_px.learn.models import find_checkpoint
from mergekit_px.learn.output import write_model
from mergekit_px.learn.transfer.arm import Arm, ArmResult, Entrant, Kind, Trial
from mergekit_px.learn.transfer.load import LoadedTransferPlan
from mergekit_px.learn.transfer.plan import Model, Transfer
from mergekit_px.learn.transfer.presets import filled_model, filled_transfer
from mergekit_px.learn.transfer.report import REPORT_FILES, Results, write_report
from mergekit_px.small_files import read_small_file

UNFINISHED = ".transfer"
PLAN_FILE = "plan.yaml"
LAST_GOOD = "last-good"

QUIET_SECONDS = 10.0
"""A run tells how far it is after so long without a line."""

_HASH_VERSION = 1


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """How a plan is carried out; what is given here goes before what the plan says."""

    output: Path | None = None
    seed: int | None = None
    seeds: int | None = None
    device: str = "auto"
    threads: int | None = None
    mode: Mode = "new"
    allow_code: bool = False
    allow_pickle: bool = False


@dataclass(frozen=True, slots=True)
class TransferOutcome:
    """A finished plan: its folder, and the report as plain data."""

    output: Path
    report: Mapping[str, Any]


def run_transfers(
    loaded: LoadedTransferPlan, options: TransferOptions, say: Callable[[str], None] = lambda line: None
) -> TransferOutcome:
    """Carry out a plan.

    Args:
        say: gets a line for each run that is finished.

    Raises:
        UsageError, InputError, PlanError: what is asked cannot be done.
        OutputError: the output folder is not free, or its unfinished run is another.
        DivergedError: a run diverged; its last good state is kept as a checkpoint.
        KeyboardInterrupt: passed on; mode ``resume`` goes on from the last saved state.
    """
    from mergekit_px.execute.lane import pick_device

    plan = loaded.plan
    output = options.output or Path(plan.output)
    device = pick_device(options.device)
    first = plan.seed if options.seed is None else options.seed
    seeds = [first + number for number in range(plan.seeds if options.seeds is None else options.seeds)]
    checkpoints = _checkpoints(loaded, options)
    trials = _trials(loaded, checkpoints, device, options)
    identity = {"seeds": seeds, "transfers": {trial.name: trial.plan_hash for trial in trials}}
    with _threads(options.threads), working_folder(output, UNFINISHED, options.mode, identity) as work:
        for name in (*REPORT_FILES, PLAN_FILE):  # of an earlier run
            (output / name).unlink(missing_ok=True)
        results = {trial.name: _run_trial(trial, seeds, output, work, say) for trial in trials}
        report = {
            "seeds": seeds,
            "device": str(device),
            "inputs": _inputs(loaded, checkpoints),
        }
        write_text(output / PLAN_FILE, loaded.text)
        document = write_report(output, report, [Results(trial, results[trial.name]) for trial in trials])
        shutil.rmtree(work, ignore_errors=True)
    return TransferOutcome(output, document)


def _run_trial(
    trial: Trial, seeds: list[int], output: Path, work: Path, say: Callable[[str], None]
) -> dict[str, list[ArmResult]]:
    """Arm -> a result for each seed."""
    results: dict[str, list[ArmResult]] = {}
    kinds: list[Kind] = ["transfer", *dict.fromkeys(trial.transfer.controls)]
    for seed in seeds:
        for kind in kinds:
            is_kept = kind == "transfer" and seed == seeds[0]
            where = (output / trial.name, work / trial.name)
            result = _run_arm(trial, kind, seed, *where, _teller(trial, kind, seed, say), is_kept=is_kept)
            results.setdefault(kind, []).append(result)
            score = result.scores["target"]["test"]
            say(f"{trial.name}, seed {seed}, {kind}: {trial.target.settings.metric} {score:.4g}")
    return results


def _teller(trial: Trial, kind: Kind, seed: int, say: Callable[[str], None]) -> Callable[[int, float], None]:
    """What says how far a run is, now and then."""
    told = time.monotonic()

    def tell(step: int, loss: float) -> None:
        nonlocal told
        if time.monotonic() - told >= QUIET_SECONDS:
            told = time.monotonic()
            say(f"{trial.name}, seed {seed}, {kind}: step {step} of {trial.transfer.steps}, loss {loss:.4g}")

    return tell


def _run_arm(
    trial: Trial,
    kind: Kind,
    seed: int,
    output: Path,
    work: Path,
    tell: Callable[[int, float], None],
    *,
    is_kept: bool,
) -> ArmResult:
    """One run, or what is left to do of it."""
    finished, state = work / f"{seed}-{kind}.json", work / f"{seed}-{kind}.safetensors"
    if finished.exists():
        return _read_result(finished)
    arm = Arm(trial, kind, seed)
    try:
        result = arm.run(state, tell)
    except DivergedError as error:
        raise _diverged(error, Arm(trial, kind, seed), state, output) from error
    if is_kept:
        for role, side in arm.sides.items():
            write_model(side.model, output / role, trial.plan_hash)
    write_text(finished, json.dumps(result.document()))
    state.unlink(missing_ok=True)
    return result


def _diverged(error: DivergedError, arm: Arm, state: Path, output: Path) -> DivergedError:
    """Keep the models of the last good state, or of the start, as checkpoints, and say so."""
    if state.exists():
        arm.restore(state)
    for role, side in arm.sides.items():
        write_model(side.model, output / LAST_GOOD / role, arm.trial.plan_hash)
    return DivergedError(
        f"{error.what} of the run '{arm.kind}'; the models of step {arm.step} are kept",
        where=str(output / LAST_GOOD),
        hint="lower the learning rates or stop_at, and start over with --overwrite",
    )


def _read_result(path: Path) -> ArmResult:
    try:
        document = json.loads(read_small_file(path, limit=LARGEST_INDEX))
        document["trace"] = [(step, loss) for step, loss in document["trace"]]
        return ArmResult(**document)
    except (InputError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            "the result of a finished run cannot be read", where=str(path), hint="start over with --overwrite"
        ) from error


def _checkpoints(loaded: LoadedTransferPlan, options: TransferOptions) -> dict[str, Checkpoint | None]:
    used = {name for transfer in loaded.plan.transfers.values() for name in (transfer.target, transfer.source) if name}
    return {
        name: None if model.weights is None else find_checkpoint(model.weights, allow_pickle=options.allow_pickle)
        for name, model in loaded.plan.models.items()
        if name in used
    }


def _trials(
    loaded: LoadedTransferPlan,
    checkpoints: Mapping[str, Checkpoint | None],
    device: torch.device,
    options: TransferOptions,
) -> list[Trial]:
    trials = []
    files: dict[tuple[str, str], Examples] = {}
    for name, given in loaded.plan.transfers.items():
        transfer = filled_transfer(given)
        target = _entrant(loaded, transfer, transfer.target, checkpoints, is_source=False)
        source = target
        if transfer.source is not None and transfer.mode != "self":
            source = _entrant(loaded, transfer, transfer.source, checkpoints, is_source=True)
        plan_hash = _plan_hash(transfer, target, source, device)
        trials.append(Trial(name, transfer, target, source, plan_hash, device, options.allow_code, loaded.where, files))
    return trials


def _entrant(
    loaded: LoadedTransferPlan,
    transfer: Transfer,
    name: str,
    checkpoints: Mapping[str, Checkpoint | None],
    *,
    is_source: bool,
) -> Entrant:
    return Entrant(name, filled_model(loaded.plan.models[name], transfer, is_source=is_source), checkpoints[name])


def _plan_hash(transfer: Transfer, target: Entrant, source: Entrant, device: torch.device) -> str:
    """Names all that the numbers of a run depend on, so that a run goes on only with the same."""
    document = {
        "version": _HASH_VERSION,
        "transfer": transfer.model_dump(),
        "device": device.type,
        "entrants": [
            {
                "name": entrant.name,
                "settings": entrant.settings.model_dump(exclude={"weights"}),
                "weights": _fingerprint(entrant.checkpoint),
                "files": _file_hashes(entrant.settings),
            }
            for entrant in (target, source)
        ],
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _fingerprint(checkpoint: Checkpoint | None) -> str | None:
    if checkpoint is None:
        return None
    reader = open_reader(checkpoint)
    try:
        return fingerprint(checkpoint, reader)
    finally:
        reader.close()


def _file_hashes(model: Model) -> dict[str, str]:
    """sha256 of the data files and of the code that a model names."""
    named = [model.model, model.loss, model.metric]
    if model.data is not None:
        named += [one for one in (model.data.train, model.data.validation, model.data.test) if isinstance(one, str)]
    paths = {one.rpartition(":")[0] if ".py:" in one else one for one in named if one is not None}
    return {path: data_sha256(path) for path in sorted(paths) if Path(path).expanduser().exists()}


def _inputs(loaded: LoadedTransferPlan, checkpoints: Mapping[str, Checkpoint | None]) -> dict[str, Any]:
    """What the report says of the inputs."""
    found = {}
    for name, checkpoint in checkpoints.items():
        model = loaded.plan.models[name]
        weights: dict[str, str] = {}
        if checkpoint is not None and checkpoint.directory is not None:
            weights = {file: file_sha256(checkpoint.directory / file) for file in checkpoint.files}
        found[name] = {"weights": model.weights, "weight_files": weights, "other_files": _file_hashes(model)}
    return found


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads of torch while the block runs."""
    if count is not None and count < 1:
        raise UsageError("at least one thread is needed")
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
