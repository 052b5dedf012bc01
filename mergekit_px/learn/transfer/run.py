"""All runs of a plan: every transfer under every seed, with its controls; then checkpoints and the report.

<output>/<transfer>/target, source    trained models of the first seed (source: modes joint and mutual)
<output>/<transfer>/last-good         what is left of a run that diverged
<output>/report.md, .png              the comparison
<output>/plan.yaml                    the plan
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from mergekit_px.checkpoint.contents import Checkpoint, StoredTensor
from mergekit_px.checkpoint.index import LARGEST_INDEX
from mergekit_px.errors import DivergedError, InputError, UsageError
from mergekit_px.learn.data import Examples
from mergekit_px.learn.declare import InputRecord
from mergekit_px.learn.inputs import Inputs, file_record, open_inputs
from mergekit_px.learn.life import Run
from mergekit_px.learn.memory import COMPUTED, floating, numbers, plan_memory
from mergekit_px.learn.output import write_model, write_text
from mergekit_px.learn.sources import source_fingerprint
from mergekit_px.learn.transfer.arm import Arm, ArmResult, Entrant, Kind, Trial, stack_sizes
from mergekit_px.learn.transfer.load import LoadedTransferPlan
from mergekit_px.learn.transfer.plan import Model, Transfer
from mergekit_px.learn.transfer.presets import filled_model, filled_transfer
from mergekit_px.learn.transfer.report import Results, write_report
from mergekit_px.learn.transfer.settings import TransferReport, TransferSettings
from mergekit_px.plan.inputs import fetch_checkpoint
from mergekit_px.small_files import read_small_file

PLAN_FILE = "plan.yaml"
LAST_GOOD = "last-good"
_TRAINED = 4
"""Numbers kept of a parameter of an adapter: itself, its gradient, two moments."""


def open_plan(settings: TransferSettings) -> Inputs:
    """The plan, and what it names: weights by the names of the models, and the files beside them.

    Raises:
        RecipeError, InputError: an invalid plan, or an input that cannot be had.
    """
    inputs = open_inputs(settings)
    plan = settings.load().plan
    used = {name for transfer in plan.transfers.values() for name in (transfer.target, transfer.source) if name}
    for name, model in plan.models.items():
        if name in used and model.weights is not None:
            found = fetch_checkpoint(model.weights, allow_pickle=settings.allow_pickle)
            inputs.checkpoints[name] = [found]
            inputs.records[name] = [InputRecord(reference=model.weights, fingerprint=source_fingerprint(found))]
        if name in used:
            inputs.records[f"{name}: files"] = _files(model)
    return inputs


def _files(model: Model) -> list[InputRecord]:
    """The data files and the code that a model names; what is missing is found out where it is read."""
    named = [model.model, model.loss, model.metric]
    if model.data is not None:
        named += [one for one in (model.data.train, model.data.validation, model.data.test) if isinstance(one, str)]
    words = sorted({word for word in named if word is not None})
    code = [file_record(word, "code") for word in words if ".py:" in word]
    return [*code, *(file_record(word, "data") for word in words if Path(word).expanduser().exists())]


def fit(run: Run[TransferSettings]) -> TransferReport:
    """Run a plan.

    Raises:
        UsageError, InputError, PlanError: what is asked cannot be done.
        DivergedError: a run diverged; its last good state is kept as a checkpoint.
    """
    settings, loaded = run.settings, run.settings.load()
    first = loaded.plan.seed if settings.seed is None else settings.seed
    seeds = [first + number for number in range(loaded.plan.seeds if settings.seeds is None else settings.seeds)]
    checkpoints = {name: found[0] for name, found in run.inputs.checkpoints.items()}
    trials = trials_of(loaded, checkpoints, run.identity, run.device, allow_code=settings.allow_code)
    if settings.memory is not None:
        _plan_memory(run, trials)
    with _threads(settings.threads):
        results = [Results(trial, _run_trial(run, trial, seeds)) for trial in trials]
    write_text(run.stage / PLAN_FILE, loaded.text)
    return write_report(run.stage, seeds, results)


def _plan_memory(run: Run[TransferSettings], trials: Sequence[Trial]) -> None:
    """Plan for the run that needs most; they follow one another.

    Raises:
        MemoryBudgetError: more than ``--memory``.
        UsageError: a model that only its function knows.
    """

    def needs(trial: Trial) -> tuple[list[StoredTensor], dict[str, int]]:
        learners = [trial.target, *([trial.source] if trial.transfer.mode in ("joint", "mutual") else [])]
        sizes, tensors = {"weights": 0, "gradients and moments": 0}, []
        for one in learners:
            if one.checkpoint is None:
                what = f"the size of '{one.name}' is known only when its function has made it"
                raise UsageError(what, where="--memory", hint="give it weights, or leave out --memory")
            tensors += floating(one.checkpoint)
            count = COMPUTED * numbers(floating(one.checkpoint))
            sizes["weights"] += count
            sizes["gradients and moments"] += (3 if one.settings.optimizer.name == "adamw" else 2) * count
        sizes["best weights"] = sizes["weights"] if trial.transfer.select == "best" else 0
        sizes["adapters"] = _TRAINED * COMPUTED * sum(stack_sizes(trial))
        return tensors, sizes

    tensors, kept = max(map(needs, trials), key=lambda found: sum(found[1].values()))
    ways = {
        "select: last": bool(kept["best weights"]),
        "mode: frozen": any(trial.transfer.mode in ("joint", "mutual") for trial in trials),
        "lower ranks or adapter.max_width": bool(kept["adapters"]),
    }
    plan_memory(run, tensors, kept, {f"write {way}": left for way, left in ways.items()})


def _run_trial(run: Run[TransferSettings], trial: Trial, seeds: list[int]) -> dict[str, list[ArmResult]]:
    """Arm -> a result for each seed."""
    results: dict[str, list[ArmResult]] = {}
    kinds: list[Kind] = ["transfer", *dict.fromkeys(trial.transfer.controls)]
    for seed in seeds:
        for kind in kinds:
            result = _run_arm(run, trial, kind, seed, is_kept=kind == "transfer" and seed == seeds[0])
            results.setdefault(kind, []).append(result)
            score = result.scores["target"]["test"]
            run.note(f"{trial.name}, seed {seed}, {kind}: {trial.target.settings.metric} {score:.4g}")
    return results


def _run_arm(run: Run[TransferSettings], trial: Trial, kind: Kind, seed: int, *, is_kept: bool) -> ArmResult:
    """One run, or what is left to do of it."""
    work = run.work / trial.name
    finished, state = work / f"{seed}-{kind}.json", work / f"{seed}-{kind}.safetensors"
    if finished.exists():
        return _read_result(finished)
    arm = Arm(trial, kind, seed)

    def tell(step: int, loss: float) -> None:
        run.tell(f"{trial.name}, seed {seed}, {kind}: step", step, trial.transfer.steps, loss)

    try:
        result = arm.run(state, tell)
    except DivergedError as error:
        raise _diverged(error, Arm(trial, kind, seed), state, run) from error
    if is_kept:
        for role, side in arm.sides.items():
            write_model(side.model, run.stage / trial.name / role, trial.plan_hash)
    write_text(finished, json.dumps(result.document()))
    state.unlink(missing_ok=True)
    return result


def _diverged(error: DivergedError, arm: Arm, state: Path, run: Run[TransferSettings]) -> DivergedError:
    """Keep the models of the last good state, or of the start, as checkpoints, and say so."""
    if state.exists():
        arm.restore(state)
    place = Path(arm.trial.name) / LAST_GOOD
    for role, side in arm.sides.items():
        write_model(side.model, run.stage / place / role, arm.trial.plan_hash)
    return DivergedError(
        f"{error.what} of the run '{arm.kind}'; the models of step {arm.step} are kept",
        where=str(run.output / place),
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


def trials_of(
    loaded: LoadedTransferPlan,
    checkpoints: Mapping[str, Checkpoint],
    identity: str,
    device: torch.device,
    *,
    allow_code: bool,
) -> list[Trial]:
    """The transfers of a plan, ready to run."""
    trials = []
    files: dict[tuple[str, str], Examples] = {}
    for name, given in loaded.plan.transfers.items():
        transfer = filled_transfer(given)
        target = _entrant(loaded, transfer, transfer.target, checkpoints, is_source=False)
        source = target
        if transfer.source is not None and transfer.mode != "self":
            source = _entrant(loaded, transfer, transfer.source, checkpoints, is_source=True)
        trials.append(Trial(name, transfer, target, source, identity, device, allow_code, loaded.where, files))
    return trials


def _entrant(
    loaded: LoadedTransferPlan,
    transfer: Transfer,
    name: str,
    checkpoints: Mapping[str, Checkpoint],
    *,
    is_source: bool,
) -> Entrant:
    return Entrant(name, filled_model(loaded.plan.models[name], transfer, is_source=is_source), checkpoints.get(name))


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads of torch while the block runs."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
