"""mergekit configs as people publish them, run by mergekit and by pxmerge on tiny models, and compared.

    python benchmarks/mergekit_configs.py CONFIGS --peer path/to/venv                # a folder of YAML files
    python benchmarks/mergekit_configs.py CONFIGS --peer path/to/venv --page docs/mergekit.md

Each model that a config names is replaced by a tiny random one of the architecture and depth that its comments name
(``# arch: mistral``, ``# layers: 32``; a Llama as deep as its slices need without them), adapters by LoRAs of rank 4.
Models and results are float32, and what is pruned at random is pruned with certainty (density 1), so that values can be
compared. Configs of several documents go to mergekit-multi. Prints a table of the configs and one of mergekit's
methods; ``--page`` puts both between the marks of a page.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_models import SMALL

TOLERANCE = 3e-5
VOCABULARY = 48
CHAT = tuple(
    f"<|{name}|>"
    for name in ("im_start", "im_end", "start_header_id", "end_header_id", "eot_id", "special", "original_token")
)
"""Tokens that configs and pages name."""
MOST_ITERATIONS = 100
"""mergekit's Karcher mean in float32 does not get below the tolerances that configs ask for, and runs on and on."""

LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
RANK = 4

PEER = """
import contextlib, io, json, logging, os, subprocess, sys
os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
import torch, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from mergekit.merge_methods.registry import registered_methods
logging.disable(logging.WARNING)
torch.set_num_threads(1)
print(json.dumps(sorted(method.spec.name for method in registered_methods())), flush=True)
for line in sys.stdin:
    path, out, cache = json.loads(line)
    error = None
    try:
        documents = list(yaml.safe_load_all(open(path)))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if len(documents) > 1:
                multi = os.path.join(os.path.dirname(sys.executable), "mergekit-multi")
                command = [multi, path, "-I", out + "-parts", "--out-path", out]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(done.stderr.strip().splitlines()[-1])
            else:
                run_merge(MergeConfiguration.model_validate(documents[0]), out, MergeOptions(lora_merge_cache=cache))
    except BaseException as failure:
        error = f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:300]
    print(json.dumps(error), flush=True)
"""
"""What runs in mergekit's environment: it names its methods, then merges what it is told to."""


@dataclass(frozen=True)
class Outcome:
    name: str
    method: str
    verdict: str
    cause: str


def model_config(arch: str, layers: int) -> Any:
    from transformers import AutoConfig

    known = AutoConfig.for_model(arch).to_dict()
    sizes = SMALL | dict.fromkeys(LAYER_KEYS, layers) | {"vocab_size": VOCABULARY}
    return AutoConfig.for_model(arch, **{key: value for key, value in sizes.items() if key in known})


def make_model(folder: Path, arch: str, layers: int) -> None:
    """The first model of a kind is random, each other one is that and noise."""
    from transformers import AutoModelForCausalLM

    first = folder.parent / "0"
    if not first.exists():
        torch.manual_seed(7)
        AutoModelForCausalLM.from_config(model_config(arch, layers)).float().save_pretrained(first)
        write_tokenizer(first)
    if folder.exists():
        return
    shutil.copytree(first, folder)
    torch.manual_seed(int(folder.name) + 100)
    for file in folder.glob("*.safetensors"):
        tensors = {
            name: value + 0.3 * value.std(correction=0).clamp(min=1e-2) * torch.randn_like(value)
            if value.is_floating_point()
            else value
            for name, value in load_file(file).items()
        }
        save_file(tensors, file, {"format": "pt"})


def make_adapter(folder: Path, model: Path) -> None:
    torch.manual_seed(int(folder.name.removeprefix("lora")) + 500)
    factors = {}
    for file in model.glob("*.safetensors"):
        for name, value in load_file(file).items():
            if value.dim() == 2 and re.search(r"(q_proj|v_proj|down_proj)\.weight$", name):
                stem = f"base_model.model.{name.removesuffix('.weight')}"
                factors[f"{stem}.lora_A.weight"] = 0.1 * torch.randn(RANK, value.shape[1])
                factors[f"{stem}.lora_B.weight"] = 0.1 * torch.randn(value.shape[0], RANK)
    folder.mkdir(exist_ok=True)
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "task_type": "CAUSAL_LM", "bias": "none"}
    config |= {"target_modules": ["q_proj", "v_proj", "down_proj"], "base_model_name_or_path": str(model)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_tokenizer(folder: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *CHAT, *(f"t{number}" for number in range(3 + len(CHAT), VOCABULARY))]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": number, "content": token, **special} for number, token in enumerate(tokens[:3])]
    words = {"type": "WordLevel", "vocab": {token: i for i, token in enumerate(tokens)}, "unk_token": "<unk>"}
    splitting = {"normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None}
    data = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **splitting, "model": words}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, **named})
    )


class Models:
    """The tiny models that stand for those that a config names."""

    def __init__(self, folder: Path, arch: str, layers: int) -> None:
        self.folder = folder
        self.arch, self.layers = arch, layers
        self.known: dict[str, Path] = {}

    def replaced(self, reference: str) -> str:
        model, _, adapter = reference.partition("+")
        parts = [self._path(model, lora=False)]
        return "+".join(map(str, [*parts, self._path(adapter, lora=True, model=parts[0])] if adapter else parts))

    def _path(self, name: str, *, lora: bool, model: Path | None = None) -> Path:
        if name not in self.known:
            count = sum(path.name.startswith("lora") == lora for path in self.known.values())
            path = self.folder / (f"lora{count + 1}" if lora else str(count + 1))
            if model is not None:
                make_adapter(path, model)
            else:
                make_model(path, self.arch, self.layers)
            self.known[name] = path
        return self.known[name]


def placed(node: Any, models: Models, steps: frozenset[str], key: str = "") -> Any:
    """The config with other models, computed in float32, and with nothing that depends on chance."""
    if isinstance(node, dict):
        out = {name: placed(child, models, steps, name) for name, child in node.items()}
        if "merge_method" in out:
            out["dtype"] = "float32"
            out.pop("out_dtype", None)
            if re.search("dare|della", str(out["merge_method"])):
                out = certain(out)
        return out
    if isinstance(node, list):
        return [placed(item, models, steps, key) for item in node]
    if key == "max_iter" and isinstance(node, int):
        return min(node, MOST_ITERATIONS)
    is_model = isinstance(node, str) and key in ("model", "base_model", "tokenizer_source", "source", "path", "lora")
    return models.replaced(node) if is_model and node not in ("union", "base", *steps) else node


def certain(node: Any) -> Any:
    if isinstance(node, dict):
        fixed = {"density": 1.0, "epsilon": 0.0}
        return {key: fixed.get(key, certain(child)) for key, child in node.items()}
    return [certain(item) for item in node] if isinstance(node, list) else node


def deepest(documents: list[Any]) -> int:
    """The layers that the slices of a config need."""

    def ranges(node: Any) -> Iterator[int]:
        for key, child in node.items() if isinstance(node, dict) else enumerate(node if isinstance(node, list) else ()):
            if key == "layer_range" and isinstance(child, list):
                yield from map(int, child)
            else:
                yield from ranges(child)

    return max(ranges(documents), default=4)


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def merge_here(config: Path, out: Path, *verb: str) -> str | None:
    """What pxmerge says if it stops."""
    command = [sys.executable, "-m", "mergekit_px", *(verb or ("run",)), str(config), "-o", str(out), "-q"]
    done = subprocess.run(command, capture_output=True, text=True)
    said = " ".join(done.stderr.split()).replace(f"{config}:", "").removeprefix("error: ")
    return said[:300] if done.returncode else None


def compare(here: Path, there: Path) -> tuple[str, str]:
    ours, theirs = read(here), read(there)
    if ours.keys() != theirs.keys():
        lacking, more = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
        return "other names", f"only there: {', '.join(lacking[:1])}; only here: {', '.join(more[:1])}"
    worst = 0.0
    for name, value in ours.items():
        if value.shape != theirs[name].shape:
            return "differs", f"{name}: {tuple(value.shape)} here, {tuple(theirs[name].shape)} there"
        difference = (value.double() - theirs[name].double()).abs().max().item()
        worst = max(worst, difference / (theirs[name].abs().max().item() or 1.0))
    return ("equal" if worst <= TOLERANCE else "differs"), f"{worst:.0e} of the largest value"


def run(config: Path, work: Path, peer: subprocess.Popen[str]) -> Outcome:
    text = config.read_text()
    documents = list(yaml.safe_load_all(text))
    arch = match[1] if (match := re.search(r"# arch: (\S+)", text)) else "llama"
    layers = int(match[1]) if (match := re.search(r"# layers: (\d+)", text)) else deepest(documents)
    kind = work / f"{arch}-{layers}"
    kind.mkdir(parents=True, exist_ok=True)
    steps = frozenset(document.get("name") for document in documents if document.get("name"))
    models = Models(kind, arch, layers)
    written = work / "config.yml"
    written.write_text(yaml.safe_dump_all([placed(document, models, steps) for document in documents], sort_keys=False))
    method = " + ".join(dict.fromkeys(str(document.get("merge_method")) for document in documents))
    verdict, cause = run_both(written, work, peer)
    return Outcome(config.stem, method, verdict, cause.replace(str(kind), ""))


def start_peer(environment: Path) -> tuple[subprocess.Popen[str], list[str]]:
    """A process of mergekit that merges what it is asked for, and the names of its methods."""
    command = [environment / "bin" / "python", "-c", PEER]
    peer = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert peer.stdout is not None
    return peer, json.loads(peer.stdout.readline())


def run_both(config: Path, work: Path, peer: subprocess.Popen[str]) -> tuple[str, str]:
    """The verdict on a config whose models are there, and its cause."""
    here, there = work / "here", work / "there"
    for folder in (here, there, work / "there-parts", work / "cache"):
        shutil.rmtree(folder, ignore_errors=True)
    ours = merge_here(config, here)
    assert peer.stdin is not None and peer.stdout is not None
    peer.stdin.write(json.dumps([str(config), str(there), str(work / "cache")]) + "\n")
    peer.stdin.flush()
    theirs = json.loads(peer.stdout.readline())
    if ours is None and theirs is None:
        return compare(here, there)
    verdict = "neither runs it" if ours and theirs else "refused here" if ours else "only here"
    return verdict, (ours or f"mergekit: {theirs}").replace("|", "/")


def config_table(rows: list[Outcome]) -> str:
    lines = ["| config | method | outcome | difference or cause |", "| --- | --- | --- | --- |"]
    lines += [f"| {row.name} | {row.method} | {row.verdict} | {row.cause} |" for row in rows]
    return "\n".join(lines) + "\n"


def method_table(names: list[str]) -> str:
    from mergekit_px.recipe.mergekit.table import METHODS

    lines = ["| mergekit | here | |", "| --- | --- | --- |"]
    for name in names:
        found = METHODS.get(name)
        target = f"`{found.target or found.name}`" if found else "-"
        deltas = f"with a base_model `{found.on_deltas}`" if found and found.on_deltas else ""
        like = f"`like: {found.like}`" if found and found.like else ""
        lines.append(f"| `{name}` | {target} | {deltas or like} |")
    return "\n".join(lines) + "\n"


def put(page: Path, part: str, table: str) -> None:
    begin, end = f"<!-- {part} -->\n", f"<!-- end of {part} -->\n"
    text = page.read_text(encoding="utf-8")
    head, rest = text.split(begin)
    page.write_text(head + begin + table + end + rest.split(end)[1], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, help="a folder of mergekit configs")
    parser.add_argument("--peer", type=Path, required=True, help="a virtual environment with mergekit")
    parser.add_argument("--only", default="*", help="a glob on their names")
    parser.add_argument("--page", type=Path, help="a page that takes the tables")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "pxmerge-configs")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    peer, names = start_peer(options.peer)
    rows = []
    for config in sorted(options.configs.glob(f"{options.only}.yml")):
        rows.append(run(config, options.work, peer))
        print(rows[-1], file=sys.stderr, flush=True)
    peer.terminate()
    print(config_table(rows), method_table(names), sep="\n")
    if options.page is not None:
        put(options.page, "methods", method_table(names))
        put(options.page, "configs", config_table(rows))
    shutil.rmtree(options.work, ignore_errors=True)


if __name__ == "__main__":
    main()
