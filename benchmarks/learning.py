"""What learning from a little data costs: memory and time, whole processes, in one run.

    python benchmarks/learning.py                        # all tables
    python benchmarks/learning.py coefficients --clients 2 8 --steps 10
    python benchmarks/learning.py stream --clients 2 16
    python benchmarks/learning.py reads --clients 2 8
    python benchmarks/learning.py tune --sources 2 16
    python benchmarks/learning.py sizes --layers 8 36

Makes a BERT classifier of about 120 MB in float32 and clients beside it.

``stream``: peak resident memory of `pxmerge ofasd --stream` for few and for many clients.
``reads``: bytes that a step of `pxmerge ofasd --stream` reads, as a multiple of base and clients (Linux).
``tune``: seconds of a step of `pxmerge tune` on components of few and of many models, as many values in each.
``sizes``: bytes for each parameter that `ofasd --stream`, `tune`, `stats` (Fisher) and `align` need, from their peaks
on bfloat16 models of Llama's shapes with few and with many layers: the difference leaves out what does not grow.
``coefficients``: `pxmerge ofasd` with and without ``--stream`` next to a plain loop that keeps all task vectors and
lets autograd do the rest, with the same batches, settings and start; the learned coefficients are compared.

A step's seconds are those of a process with many steps less those of one with few, divided by the steps between; of
several repeats the fastest counts. Processor time is given beside the time by the clock, since it changes less where
other processes run. One thread, or as many as ``OMP_NUM_THREADS`` says. Peak memory is that of a whole process as the
system accounts it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

LENGTH, CLASSES, EXAMPLES, BATCH = 16, 4, 40, 8
RATE, DECAY = 0.01, 0.1
THREADS = os.environ.get("OMP_NUM_THREADS", "1")


@dataclass(frozen=True)
class Shape:
    """Of the model that is made."""

    width: int
    layers: int
    words: int


def make(work: Path, shape: Shape, clients: int) -> None:
    """``base``, ``client0`` ... and ``data.npz``."""
    import numpy
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=shape.words,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=8,
        intermediate_size=4 * shape.width,
        max_position_embeddings=64,
        num_labels=CLASSES,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(work / "base")
    base = load_file(work / "base" / "model.safetensors")
    for number in range(clients):
        generator = torch.Generator().manual_seed(number)
        tuned = {}
        for name, tensor in base.items():
            noise = torch.randn(tensor.shape, generator=generator)
            tuned[name] = tensor + 0.01 * noise if tensor.ndim == 2 else tensor + 0.001 * noise
        (work / f"client{number}").mkdir()
        save_file(tuned, work / f"client{number}" / "model.safetensors", {"format": "pt"})
        shutil.copy(work / "base" / "config.json", work / f"client{number}" / "config.json")
    random = numpy.random.default_rng(0)
    words = random.integers(0, shape.words, (2, LENGTH))  # two, repeated: what fits the training fits the validation
    labels = numpy.arange(EXAMPLES) % 2
    numpy.savez(work / "data.npz", input_ids=words[labels], labels=labels)


@dataclass(frozen=True)
class Cost:
    """Of a process: seconds by the clock, seconds of processor time, peak resident bytes."""

    seconds: float
    processor: float
    peak: float


def cheapest(costs: list[Cost]) -> Cost:
    """The least times and the largest peak."""
    return Cost(min(one.seconds for one in costs), min(one.processor for one in costs), max(one.peak for one in costs))


def a_step(short: Cost, long: Cost, steps: int) -> str:
    """Two cells of a table: what one of the steps between two processes takes."""
    clock, processor = ((getattr(long, what) - getattr(short, what)) / steps for what in ("seconds", "processor"))
    return f"{clock:.2f} | {processor:.2f}"


def measured(command: list[str]) -> Cost:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": THREADS}
    start = time.perf_counter()
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            stderr.seek(0)
            sys.exit(f"{command}: {stderr.read().decode()}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Cost(seconds, usage.ru_utime + usage.ru_stime, peak)


def ours(work: Path, clients: int, steps: int, *, stream: bool) -> list[str]:
    line = [sys.executable, "-m", "mergekit_px", "ofasd", "--base", str(work / "base"), "--sources"]
    line += [str(work / f"client{number}") for number in range(clients)]
    line += ["--data", str(work / "data.npz"), "-o", str(work / "out"), "--overwrite", "-q", "--controls", "cheap"]
    line += ["--objective", "cross-entropy", "--batch", str(BATCH), "--steps", str(steps), "--device", "cpu"]
    line += ["--learning-rate", str(RATE), "--weight-decay", str(DECAY), "--initial", "0"]
    return [*line, "--evaluate-every", str(max(steps, 1)), *(["--stream"] if stream else [])]


def plain(work: Path, clients: int, steps: int) -> None:
    """The loop without anything of the project but its batches; writes the coefficients and losses."""
    import torch
    import transformers
    from safetensors.torch import load_file
    from torch.func import functional_call
    from torch.nn.functional import cross_entropy

    from mergekit_px.learn.data import examples, read_arrays, shuffled, split_rows

    data = examples(read_arrays(work / "data.npz"), "data.npz")
    rows = split_rows(len(data), {"validation": 0.2, "test": 0.2}, 0, data.where)["train"]
    stream = shuffled(data.take(rows), BATCH, 0, "train")
    model = transformers.BertForSequenceClassification.from_pretrained(work / "base").eval()
    base = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tuned = [load_file(work / f"client{number}" / "model.safetensors") for number in range(clients)]
    deltas = {name: [one.pop(name).sub_(tensor) for one in tuned] for name, tensor in base.items()}
    values = torch.zeros(clients, len(base), requires_grad=True)
    optimizer = torch.optim.AdamW([values], lr=RATE, weight_decay=DECAY)
    losses = []
    for step in range(steps):
        batch = stream.next()
        merged = {
            name: tensor + sum(values[row, column] * delta for row, delta in enumerate(deltas[name]))
            for column, (name, tensor) in enumerate(base.items())
        }
        logits = functional_call(model, merged, kwargs={"input_ids": batch["input_ids"]}).logits
        loss = cross_entropy(logits, batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([values], 1.0)
        optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
        losses.append(float(loss.detach()))
    found = {name: values[:, column].tolist() for column, name in enumerate(base)}
    mean = math.fsum(losses) / len(losses) if losses else None
    (work / "plain.json").write_text(json.dumps({"loss": mean, "coefficients": found}))


def coefficients(work: Path, options: argparse.Namespace) -> None:
    print("\n| clients | loop | s a step | processor s a step | s in all | peak MB | mean loss | coefficients off by |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for clients in options.clients or [2, 8]:
        loops = {"plain, all resident": [sys.executable, __file__, "plain", "--work", str(work)]}
        short: dict[str, Cost] = {}
        long: dict[str, Cost] = {}
        for name in (*loops, "pxmerge", "pxmerge --stream"):
            for steps, kept in ((1, short), (1 + options.steps, long)):
                if name in loops:
                    command = [*loops[name], "--clients", str(clients), "--steps", str(steps)]
                else:
                    command = ours(work, clients, steps, stream="stream" in name)
                kept[name] = cheapest([measured(command) for _ in range(options.repeats)])
            step = a_step(short[name], long[name], options.steps)
            loss, difference = compared(work, name)
            whole = f"{long[name].seconds:.1f} | {long[name].peak / 1e6:.0f}"
            print(f"| {clients} | {name} | {step} | {whole} | {loss:.6f} | {difference} |", flush=True)


def compared(work: Path, name: str) -> tuple[float, str]:
    """Mean loss of the steps, and how far the last coefficients are from those of the plain loop."""
    theirs = json.loads((work / "plain.json").read_text())
    if name.startswith("plain"):
        return theirs["loss"], ""
    report = json.loads((work / "out" / "report.json").read_text())
    worst = max(
        abs(one - other)
        for block, values in report["coefficients"].items()
        for one, other in zip(values, theirs["coefficients"][block], strict=True)
    )
    return report["trace"][-1][1], f"{worst:.1e} (best after step {report['best_step']})"


def stream(work: Path, options: argparse.Namespace) -> None:
    print("\n| clients | loop | peak MB | s in all |\n| --- | --- | --- | --- |")
    peaks = []
    counts = options.clients or [2, 16]
    for clients in counts:
        cost = measured(ours(work, clients, 3, stream=True))
        peaks.append(cost.peak)
        print(f"| {clients} | pxmerge --stream | {cost.peak / 1e6:.0f} | {cost.seconds:.1f} |", flush=True)
    print(f"\n{counts[-1]} clients: {peaks[-1] / peaks[0]:.2f} times the memory of {counts[0]}")


def reads(work: Path, options: argparse.Namespace) -> None:
    print("\n| clients | coefficients | MB read a step | of base and clients |\n| --- | --- | --- | --- |")
    size = (work / "base" / "model.safetensors").stat().st_size
    for clients in options.clients or [2, 8]:
        for what in ("tensor", "model"):
            few, many = (
                _bytes_read([*ours(work, clients, steps, stream=True), "--granularity", what])
                for steps in (options.steps, 2 * options.steps)
            )
            step = (many - few) / options.steps
            print(f"| {clients} | a {what} | {step / 1e6:.0f} | {step / size / (clients + 1):.2f} |", flush=True)


def _bytes_read(command: list[str]) -> int:
    code = (
        "import sys; from mergekit_px.cli import main; failed = main(sys.argv[1:]);"
        "print(open('/proc/self/io').read().split()[1]); sys.exit(failed)"
    )
    line = [sys.executable, "-c", code, *command[command.index("ofasd") :]]
    return int(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def tune(work: Path, options: argparse.Namespace) -> None:
    print("\n| models merged | s a step | processor s a step | s in all | peak MB | values trained |")
    print("| --- | --- | --- | --- | --- | --- |")
    counts = options.sources or [2, 16]
    shape = ["--overwrite", "-q", "--device", "cpu"]
    for count in counts:
        sources = [str(work / f"client{number}") for number in range(count)]
        line = [sys.executable, "-m", "mergekit_px", "svd", "--base", str(work / "base"), "--sources", *sources]
        measured([*line, "--top-k", "32", "--as", "components", "-o", str(work / f"pool{count}"), *shape])
    costs: dict[int, dict[int, list[Cost]]] = {count: {1: [], 1 + options.steps: []} for count in counts}
    for _ in range(max(options.repeats, 3)):
        for count in counts:
            for steps, kept in costs[count].items():
                line = [sys.executable, "-m", "mergekit_px", "tune", str(work / f"pool{count}"), *shape]
                line += [
                    "--base",
                    str(work / "base"),
                    "--data",
                    str(work / "data.npz"),
                    "-o",
                    str(work / f"tuned{count}"),
                ]
                kept.append(measured([*line, "--top", "32", "--batch", "24", "--steps", str(steps)]))
    for count in counts:
        short, long = (cheapest(kept) for kept in costs[count].values())
        trained = json.loads((work / f"tuned{count}" / "report.json").read_text())["trained_values"]
        step, whole = a_step(short, long, options.steps), f"{long.seconds:.1f} | {long.peak / 1e6:.0f}"
        print(f"| {count} | {step} | {whole} | {trained} |", flush=True)


def make_llama(work: Path, layers: int) -> int:
    """``base``, ``client0``, ``client1`` and ``data.npz``; the number of parameters."""
    import numpy
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
        dtype=torch.bfloat16,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(work / "base")
    for number in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        model.save_pretrained(work / f"client{number}")
    ids = numpy.random.default_rng(0).integers(0, 2000, (16, 8))
    numpy.savez(work / "data.npz", input_ids=ids, labels=ids)
    return sum(parameter.numel() for parameter in model.parameters())


def sizes(work: Path, options: argparse.Namespace) -> None:
    """Peaks of whole processes at two sizes."""
    peaks: dict[str, list[float]] = {}
    counts = []
    for layers in options.layers or [8, 36]:
        place = work / f"llama{layers}"
        place.mkdir()
        counts.append(make_llama(place, layers))
        base, data, *clients = (str(place / name) for name in ("base", "data.npz", "client0", "client1"))
        line = [sys.executable, "-m", "mergekit_px"]
        pool = ["svd", "--base", base, "--sources", *clients, "--top-k", "4", "--as", "components"]
        measured([*line, *pool, "-o", str(place / "pool"), "-q"])
        shared = ["--data", data, "--overwrite", "-q", "--device", "cpu", "-o", str(place / "out")]
        trained = [*shared, "--batch", "2", "--steps", "2", "--checkpoint-activations"]
        few = [*trained, "--controls", "none"]
        commands = {
            "ofasd --stream": ["ofasd", "--base", base, "--sources", *clients, "--stream", *few],
            "tune": ["tune", str(place / "pool"), "--base", base, *trained],
            "stats --what fisher": ["stats", base, "--what", "fisher", "--labels", "given", *shared, "--examples", "4"],
            "align": ["align", "--source-base", base, "--source-model", clients[0], "--base", clients[1], *few],
        }
        for name, command in commands.items():
            if not options.only or name.split()[0] in options.only:
                out = ["-o", str(place / f"{name.split()[0]}.safetensors")] if name.startswith("stats") else []
                peaks.setdefault(name, []).append(measured([*line, *command, *out]).peak)
    print(f"\n| bfloat16 | {' | '.join(f'MB at {count / 1e6:.0f} M' for count in counts)} | bytes a parameter |")
    print("| --- | --- | --- | --- |")
    for name, (small, large) in peaks.items():
        slope = (large - small) / (counts[1] - counts[0])
        print(f"| {name} | {small / 1e6:.0f} | {large / 1e6:.0f} | {slope:.1f} |", flush=True)


TABLES = {"sizes": sizes, "stream": stream, "reads": reads, "tune": tune, "coefficients": coefficients}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=[*TABLES, "plain"], help="one of the tables; all if left out")
    parser.add_argument("--clients", type=int, nargs="+")
    parser.add_argument("--sources", type=int, nargs="+")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--only", nargs="+", help="of the commands of sizes")
    parser.add_argument("--words", type=int, default=8000)
    parser.add_argument("--work", type=Path, help="where models are made; a memory file system measures best")
    options = parser.parse_args()
    if options.table == "plain":
        plain(options.work, options.clients[0], options.steps)
        return
    if options.work is not None:
        Path(options.work).mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="pxmerge-learning-", dir=options.work))
    try:
        if options.table == "sizes":
            sizes(work, options)
            return
        most = max([*(options.clients or [16]), *(options.sources or [16 if options.table in (None, "tune") else 2])])
        make(work, Shape(options.width, (options.layers or [8])[0], options.words), most)
        size = (work / "base" / "model.safetensors").stat().st_size
        print(f"model of {size / 1e6:.0f} MB, {THREADS} threads, batches of {BATCH} x {LENGTH} tokens", flush=True)
        for name in [options.table] if options.table else TABLES:
            TABLES[name](work, options)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
