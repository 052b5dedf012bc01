"""From a plan to a published checkpoint."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_px.checkpoint.destination import RECIPE_FILE, check_mode, destination
from mergekit_px.checkpoint.direct import available_memory
from mergekit_px.checkpoint.held import Held
from mergekit_px.checkpoint.open import Checkpoint
from mergekit_px.checkpoint.publish import SideFile
from mergekit_px.checkpoint.reader import FileReader, TensorReader, open_reader
from mergekit_px.checkpoint.writer import CheckpointWriter
from mergekit_px.errors import OutputError, PlanError, UsageError
from mergekit_px.execute.allocator import keep_freed_memory
from mergekit_px.execute.events import Progress, Report, RunResult
from mergekit_px.execute.finished import claims_result, finished_files
from mergekit_px.execute.fused import FusedItems, Sink
from mergekit_px.execute.locking import check_locked
from mergekit_px.execute.provenance import CARD_FILE, InputHashes, card, lock_file
from mergekit_px.execute.scheduler import Scheduler
from mergekit_px.execute.warnings import gathered_warnings
from mergekit_px.plan.build import build_plan
from mergekit_px.plan.inputs import ResolvedInput, fetch_input
from mergekit_px.plan.model import Plan, WorkItem
from mergekit_px.plan.schedule import shared_groups
from mergekit_px.plan.sources import equal_sources
from mergekit_px.plan.texts import config_text, recipe_text
from mergekit_px.recipe.chat_template import jinja_text
from mergekit_px.stages import timed

if TYPE_CHECKING:
    import torch

    from mergekit_px.execute.items import Execution
    from mergekit_px.execute.lane import Lane
    from mergekit_px.execute.sweeps import Totals


def run_plan(plan: Plan, *, progress: Report | None = None) -> RunResult:
    """Run a plan: fetch what is on the Hub, compute, write, publish.

    Args:
        plan: as :func:`build_plan` gives it; its options say whether an unfinished run is resumed.
        progress: called from worker threads, a few times a second at most.

    Raises:
        InputError: an input that cannot be fetched or read.
        NonFiniteError, WriteError, OutputLockedError: the run stopped; ``mode="resume"`` goes on.
        KeyboardInterrupt: after running jobs have ended; resumable too.
    """
    return run_plans([plan], progress=progress)[0]


def run_plans(plans: Sequence[Plan], *, progress: Report | None = None) -> list[RunResult]:
    """Run plans with outputs of their own in one pass over their inputs; see :func:`run_plan`.

    An input's name must mean the same checkpoint in all of them. All outputs are complete before the first is
    published. ``bytes_read`` of a result leaves out what an earlier one counts.
    """
    if any(plan.store is not None for plan in plans):
        raise UsageError("a merge to a store is carried out by run_to_store, one at a time")
    if any(plan.output is None for plan in plans):
        raise UsageError("a merge in memory has no output folder; use merge_state_dicts")
    results: dict[int, RunResult] = {}
    pending: dict[int, Plan] = {}
    for number, plan in enumerate(plans):
        found = begun(plan, progress)
        if isinstance(found, RunResult):
            results[number] = found
        else:
            pending[number] = found
    if pending:
        finished = _carried_out(list(pending.values()), progress)
        results.update(zip(pending, finished, strict=True))
    return [results[number] for number in range(len(plans))]


def begun(plan: Plan, progress: Report | None) -> Plan | RunResult:
    """The plan with its inputs on this machine; or its result, where the output is that already."""
    assert plan.output is not None
    started = time.perf_counter()
    if plan.device not in ("auto", "cpu"):  # those two are everywhere, and torch may not be needed
        from mergekit_px.execute.lane import pick_device

        pick_device(plan.device)
    try:
        check_mode(plan.output, plan.options.mode, plan.hash)
        return fetch_inputs(plan, progress)
    except OutputError:
        if not claims_result(plan):
            raise
        plan = fetch_inputs(plan, progress)
        files = finished_files(plan, settled_files(plan))
        if files is None:
            raise
        return _up_to_date(plan, files, time.perf_counter() - started)


def _carried_out(plans: Sequence[Plan], progress: Report | None) -> list[RunResult]:
    started = time.perf_counter()
    reporter = Reporter(plans, progress)
    inputs = {name: source for plan in plans for name, source in plan.inputs.items()}
    checkpoints = {label: checkpoint for plan in plans for label, checkpoint in plan_checkpoints(plan).items()}
    direct = _past_cache(plans)
    with ExitStack() as stack:
        readers = {
            label: stack.enter_context(closing(open_reader(checkpoint, direct=direct)))
            for label, checkpoint in checkpoints.items()
        }
        writers = [stack.enter_context(_writer(plan)) for plan in plans]
        hashes = InputHashes(
            inputs,
            local=plans[0].options.hash_inputs,
            records={writer.inputs_file: writer.finished_bytes > 0 for writer in writers},
            bytes_read=partial(bytes_read, readers),
            held=_held(readers) if direct else None,
        )
        stack.callback(hashes.stop)
        side_files = [_side_files(plan, hashes) for plan in plans]
        with gathered_warnings() as warnings:
            if len(plans) == 1:
                execute(plans[0], readers, writers[0], partial(reporter.advance, 0))
            else:
                execute_together(plans, readers, writers, reporter)
        reporter.phase("publishing")
        published = [writer.publish(files) for writer, files in zip(writers, side_files, strict=True)]
        read = hashes.result()
    seconds = time.perf_counter() - started
    reporter.phase("done")
    counted: set[tuple[str, str]] = set()
    return [
        RunResult(
            output=plan.output or Path(),
            files={name: file.sha256 for name, file in files.files.items()},
            seconds=seconds,
            bytes_read=_bytes_read(plan, counted),
            bytes_written=plan.bytes_written,
            peak_memory=peak_memory(),
            notes=plan.notes,
            warnings=(*warnings.lines(), *_equal_sources(plan, read)),
        )
        for plan, files in zip(plans, published, strict=True)
    ]


def _past_cache(plans: Sequence[Plan]) -> bool:
    """Whether inputs are read past the page cache: where they would push each other out of it before another run can
    gain from it, and the memory for that is planned."""
    counted: set[tuple[str, str]] = set()
    room = available_memory()
    planned = all(plan.budget.past_cache for plan in plans)
    return planned and room is not None and 2 * sum(_bytes_read(plan, counted) for plan in plans) > room


def _held(readers: Mapping[str, TensorReader]) -> Held:
    """Keeps what readers read, for the hashes of their files."""
    held = Held()

    def keep(label: str, name: str, place: int, data: memoryview) -> None:
        held.put((label, name), place, data)

    for label, reader in readers.items():
        if isinstance(reader, FileReader):
            reader.passing = partial(keep, label)
    return held


def bytes_read(readers: Mapping[str, TensorReader], label: str, file: str) -> int | None:
    """Of a file of an input, as far as its reader counts."""
    reader = readers.get(label)
    return reader.bytes_read[file] if isinstance(reader, FileReader) else None


def _writer(plan: Plan) -> CheckpointWriter:
    assert plan.output is not None
    return CheckpointWriter(plan.output, plan.layout, plan.hash, mode=plan.options.mode, direct=plan.budget.past_cache)


def _equal_sources(plan: Plan, hashes: Mapping[tuple[str, str], str | None]) -> list[str]:
    """Sources that turned out to be the same bytes, if the plan has not said so already."""
    found = equal_sources(plan.loaded.recipe, plan.inputs, lambda label, _, file: hashes.get((label, file.name)))
    return [line for line in found if line not in plan.notes]


def _bytes_read(plan: Plan, counted: set[tuple[str, str]]) -> int:
    """Bytes of input that a plan reads and that no plan before it has read."""
    total = 0
    for item in plan.items:
        total += item.factor_bytes
        total += sum(read.tensor.nbytes for read in item.reads if (read.input, read.tensor.name) not in counted)
    counted.update((read.input, read.tensor.name) for item in plan.items for read in item.reads)
    return total


def _up_to_date(plan: Plan, files: Mapping[str, str], seconds: float) -> RunResult:
    assert plan.output is not None
    return RunResult(plan.output, files, seconds, 0, 0, peak_memory(), plan.notes, up_to_date=True)


def execute(
    plan: Plan,
    readers: Mapping[str, TensorReader],
    sink: Sink,
    advance: Callable[[str, int], None],
    *,
    items: Sequence[WorkItem] | None = None,
    totals: Sequence[Sequence[torch.Tensor]] | None = None,
) -> None:
    """Compute the items of a plan into a sink; ``items``: some of them, with statistics over all that share them.

    torch is loaded only if one of them needs it. ``totals``: of the sweeps of each shared group, where they are known.
    """
    items = plan.items if items is None else items
    fused = _fused(plan, readers, sink, advance)
    groups = shared_groups(plan.items)
    swept = [item for group in groups for item, _ in group]
    alone = all(sum(node.method.statistics is not None for node in item.applied) == 1 for item in swept)
    by_elements = plan.device in ("auto", "cpu") and alone and not (groups and totals is not None)
    if by_elements and all(map(fused.covers, plan.items if groups else items)):
        for group in groups:
            Scheduler(lambda: None, plan.budget.workers).run(iter([fused.shared_statistics(group)]))
        Scheduler(lambda: None, plan.budget.workers).run(map(fused.routine, items))
        return
    with timed("import"):
        from mergekit_px.execute.lane import Lane, pick_device
    keep_freed_memory()
    device = pick_device(plan.device)
    execution = _execution(plan, fused)
    scheduler = partial(Scheduler, partial(Lane, device), plan.budget.workers, _memory_of_whole_tensors(plan))
    if totals is None:
        for group in groups:
            scheduler().run(iter([execution.shared_statistics(group)]))
    else:
        for group, known in zip(groups, totals, strict=True):
            execution.known_statistics(group, known)
    scheduler().run(map(execution.routine, items))


def partial_sums(
    plan: Plan, readers: Mapping[str, TensorReader], share: Sequence[int], totals: Sequence[Sequence[torch.Tensor]]
) -> Totals:
    """What some members of a shared group, by their numbers, add to its next sweep.

    ``totals``: those of all sweeps of the groups before it, and those of its own so far.
    """
    from mergekit_px.execute.lane import Lane, pick_device
    from mergekit_px.execute.sweeps import Totals

    keep_freed_memory()
    execution = _execution(plan, _fused(plan, readers, _NoOutput(), lambda name, nbytes: None))
    groups = shared_groups(plan.items)
    for group, known in zip(groups, totals[:-1], strict=False):
        execution.known_statistics(group, known)
    sums = Totals()
    routine = execution.partial_sums(groups[len(totals) - 1], share, totals[-1], sums)
    Scheduler(partial(Lane, pick_device(plan.device)), plan.budget.workers).run(iter([routine]))
    return sums


class _NoOutput:
    """The sink of statistics: nothing is written, and nothing was."""

    def done(self, name: str, start: int, stop: int) -> bool:
        return False

    def write(self, name: str, start: int, buffer: memoryview) -> None:
        raise AssertionError(name)


def execute_together(
    plans: Sequence[Plan], readers: Mapping[str, TensorReader], sinks: Sequence[Sink], reporter: Reporter
) -> None:
    """Compute the items of several plans, each into its sink; what they share is read once."""
    from mergekit_px.execute.together import Output, covers, joint_budget, members_by_tensor, routine

    outputs = []
    for number, (plan, sink) in enumerate(zip(plans, sinks, strict=True)):
        fused = _fused(plan, readers, sink, partial(reporter.advance, number))
        outputs.append(Output(plan, fused, cache(partial(_execution, plan, fused))))
    groups = members_by_tensor(outputs)
    budget = joint_budget(plans, groups)
    for output in outputs:
        output.fused.chunk, output.fused.workers = budget.chunk, budget.workers
    statistics = [(output, group) for output in outputs for group in shared_groups(output.plan.items)]
    if plans[0].device in ("auto", "cpu") and not statistics and all(map(covers, groups)):
        Scheduler(lambda: None, budget.workers).run(map(routine, groups))
        return
    with timed("import"):
        from mergekit_px.execute.lane import Lane, pick_device
    keep_freed_memory()
    whole = _memory_of_whole_tensors(replace(plans[0], budget=budget))
    scheduler = partial(Scheduler, partial(Lane, pick_device(plans[0].device)), budget.workers, whole)
    for output, group in statistics:
        scheduler().run(iter([output.execution().shared_statistics(group)]))
    scheduler().run(map(routine, groups))


def _fused(
    plan: Plan, readers: Mapping[str, TensorReader], sink: Sink, advance: Callable[[str, int], None]
) -> FusedItems:
    def by_torch(statistics: Mapping[int, Any]) -> tuple[Execution, Lane]:
        from mergekit_px.execute.lane import Lane, pick_device

        execution = _execution(plan, fused)
        execution.statistics.update(statistics)
        return execution, Lane(pick_device("cpu"))

    fused = FusedItems(
        readers=readers,
        sink=sink,
        chunk=plan.budget.chunk,
        workers=plan.budget.workers,
        seed=plan.seed,
        allow_nonfinite=plan.options.allow_nonfinite,
        advance=advance,
        by_torch=by_torch,
    )
    return fused


def _execution(plan: Plan, fused: FusedItems) -> Execution:
    from mergekit_px.execute.items import Execution

    return Execution(
        readers=fused.readers,
        labels={label: checkpoint.label for label, checkpoint in plan_checkpoints(plan).items()},
        sink=fused.sink,
        chunk=fused.chunk,
        seed=plan.seed,
        allow_nonfinite=plan.options.allow_nonfinite,
        advance=fused.advance,
        fused=fused,
    )


def _memory_of_whole_tensors(plan: Plan) -> int:
    """What tensors that are needed whole may occupy together: several of the largest, or all that the user grants."""
    budget, granted = plan.budget, plan.options.memory
    return budget.whole if granted is None else granted - (budget.total - budget.whole)


def plan_checkpoints(plan: Plan) -> dict[str, Checkpoint]:
    """Every checkpoint that a plan reads: inputs by their names, their adapters as ``name#0``, ``name#1``."""
    found: dict[str, Checkpoint] = {}
    for name, source in plan.inputs.items():
        found[name] = source.checkpoint
        found.update({f"{name}#{number}": adapter.checkpoint for number, adapter in enumerate(source.adapters)})
    return found


def fetch_inputs(plan: Plan, progress: Report | None = None) -> Plan:
    """A plan whose inputs are all on this machine, at the commits that were planned, and what its lock says of them.

    Raises ``InputError``.
    """
    plan = _fetched(plan, progress)
    check_locked(plan, progress)
    return plan


def _fetched(plan: Plan, progress: Report | None) -> Plan:
    missing = {
        name: source
        for name, source in plan.inputs.items()
        if source.checkpoint.directory is None and source.repo is not None
    }
    if not missing:
        return plan
    inputs: dict[str, ResolvedInput] = dict(plan.inputs)
    for name, source in missing.items():

        def tell(done: int, total: int, label: str = source.reference) -> None:
            if progress is not None:
                progress(Progress(f"fetching {label}", done, total, 0, len(plan.items), label))

        # A run checks the bytes of cached files while it reads them.
        inputs[name] = fetch_input(source, tell, verify_cached=False)
    rebuilt = build_plan(plan.loaded, plan.options, inputs)
    if [item.name for item in rebuilt.items] != [item.name for item in plan.items]:
        raise PlanError("the fetched files differ from the headers that were planned", hint="run again")
    return rebuilt


def peak_memory() -> int:
    """Peak resident memory of this process in bytes; 0 where the platform does not tell."""
    try:
        # Unlike getrusage, this does not count what the parent process held when it started this one.
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _side_files(plan: Plan, hashes: InputHashes) -> dict[str, SideFile]:
    assert plan.output is not None
    files = settled_files(plan)
    place = destination(plan.output)
    if place.file is None:
        files[CARD_FILE] = card(plan)
        files[RECIPE_FILE] = recipe_text(plan.published)
    files[place.lock_file] = lambda published: lock_file(plan, hashes.result(), published)
    return files


def settled_files(plan: Plan) -> dict[str, SideFile]:
    """What lies beside the weights and follows from the plan and the inputs alone."""
    files: dict[str, SideFile] = {}
    if plan.output is not None and destination(plan.output).file is not None:
        return files
    for name, donor in plan.side_files.items():
        model, _, number = donor.partition("#")
        source = plan.inputs[model]
        directory = (source.adapters[int(number)] if number else source).checkpoint.directory
        if directory is not None:
            files[name] = Path(directory) / name
    files |= plan.texts
    if plan.loaded.recipe.output.chat_template is not None:
        files["chat_template.jinja"] = jinja_text(plan.loaded.recipe.output.chat_template).encode()
    files.update({name: config_text(config) for name, config in plan.part_configs.items()})
    if plan.config is not None:
        files["config.json"] = config_text(plan.config)
    return files


class Reporter:
    """Counts bytes and tensors over all threads and passes them on at most ten times a second."""

    def __init__(self, plans: Sequence[Plan], report: Report | None) -> None:
        self._report = report
        self._started = time.perf_counter()
        self._lock = threading.Lock()
        self._total = {(number, item.name): item.nbytes for number, plan in enumerate(plans) for item in plan.items}
        self._left = dict(self._total)
        self._bytes_total = sum(self._total.values())
        self._bytes = 0
        self._tensors = sum(1 for nbytes in self._total.values() if nbytes == 0)
        self._phase = "merging"
        self._last = 0.0
        self._name = ""

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self._started

    def advance(self, number: int, name: str, nbytes: int) -> None:
        with self._lock:
            self._name = name
            self._bytes += nbytes
            self._left[number, name] -= nbytes
            if self._left[number, name] == 0:
                self._tensors += 1
            now = time.monotonic()
            if self._report is None or now - self._last < 0.1:
                return
            self._last = now
            state = self._state()
        self._report(state)

    def phase(self, phase: str) -> None:
        with self._lock:
            self._phase = phase
            state = self._state()
        if self._report is not None:
            self._report(state)

    def _state(self) -> Progress:
        return Progress(self._phase, self._bytes, self._bytes_total, self._tensors, len(self._total), self._name)
