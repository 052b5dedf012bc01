"""The merges of FusionBench and of sd-mecha beside those of pxmerge, on a tiny language model.

    python benchmarks/other_tools.py                      # fetches both tools (no dependencies of size), runs all cases
    python benchmarks/other_tools.py --cases "TSV-M" WUDI

A Llama of two layers in float32, a base and three fine-tunes. Each case runs one algorithm of another tool by that
tool's own code in a process of its own, and one line of pxmerge. What is printed is the largest difference of a tensor,
as a share of the largest change that pxmerge made to it. Below 3e-5 the two are equal but for rounding. Where they
differ, the case names the reason. Draws of random numbers differ between tools, so methods with them (DARE, DELLA) are
left out; FusionBench's OPCM does not import beside transformers 5.

Exits with 1 where two are not equal that should be, or differ no more.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = dict[str, Tensor]

PEERS = ("fusion-bench==0.2.33", "sd-mecha==1.1.8")
NEEDED = ("omegaconf", "antlr4-python3-runtime==4.9.3", "hydra-core", "fuzzywuzzy", "lightning", "lightning-utilities")
NEEDED += (
    "pytorch-lightning",
    "torchmetrics",
    "bidict",
    "datasets",
    "pyarrow",
    "dill",
    "multiprocess",
    "xxhash",
    "pandas",
)
"""What their code imports; torch and transformers are those of this process."""
SOURCES = ("fine0", "fine1", "fine2")
EQUAL = 3e-5
ROUNDING = 2.0**-23
"""Of float32, relative."""


@dataclass(frozen=True)
class Case:
    tool: str
    algorithm: str
    line: Sequence[str]
    """Of pxmerge, without the models."""
    models: Sequence[str] = SOURCES
    settings: Mapping[str, Any] | None = None
    differs: str = ""
    """Why the results are not equal; nothing where they are."""
    corrects: Sequence[str] = ()
    """A line whose result is the first source."""


def _fusion(algorithm: str, *line: str, **rest: Any) -> Case:
    return _case("FusionBench", algorithm, line, **rest)


def _mecha(algorithm: str, *line: str, **rest: Any) -> Case:
    return _case("sd-mecha", algorithm, line, **rest)


def _case(
    tool: str,
    algorithm: str,
    line: Sequence[str],
    models: Sequence[str] = SOURCES,
    differs: str = "",
    corrects: Sequence[str] = (),
    **settings: Any,
) -> Case:
    return Case(tool, algorithm, line, models, settings, differs, corrects)


_TWO = SOURCES[:2]
_SHARES = (0.5, 0.3, 0.2)
_ONE_MORE = "it keeps one element more of each source, as the authors' code: the k-th value counts in"
CASES: Mapping[str, Case] = {
    "average": _fusion("SimpleAverageAlgorithm", "linear"),
    "weighted average": _fusion(
        "WeightedAverageAlgorithm", "linear", "--weights", *map(str, _SHARES), weights=_SHARES, normalize=True
    ),
    "task arithmetic": _fusion("TaskArithmeticAlgorithm", "task-arithmetic", "--scale", "0.3", scaling_factor=0.3),
    "TIES, mean": _fusion(
        "TiesMergingAlgorithm",
        *("ties", "--density", "0.2", "--scale", "0.7", "--divide-by", "count"),
        scaling_factor=0.7,
        threshold=20,
        remove_keys=[],
        merge_func="mean",
        differs=_ONE_MORE,
    ),
    "TIES, sum": _fusion(
        "TiesMergingAlgorithm",
        *("ties", "--density", "0.2", "--scale", "0.3", "--divide-by", "nothing"),
        scaling_factor=0.3,
        threshold=20,
        remove_keys=[],
        merge_func="sum",
        differs=_ONE_MORE,
    ),
    "SLERP": _fusion("SlerpMergeAlgorithm", "slerp", "--t", "0.3", models=_TWO, t=0.3),
    "MagMax": _fusion("MagMaxAlgorithm", "magmax", "--scale", "0.5", scaling_factor=0.5),
    "ExPO": _fusion("ExPOAlgorithm", "expo", "--alpha", "0.4", models=SOURCES[:1], extrapolation_factor=0.4),
    "Model Stock of two": _fusion("ModelStock", "model-stock", models=_TWO, ignore_keys=[]),
    "Model Stock of three": _fusion(
        "ModelStock", "model-stock", ignore_keys=[], differs="it averages the pairs' angles, and here their cosines"
    ),
    "Iso-C": _fusion("ISO_C_Merge", "iso-c", "--like", "paper", scaling_factor=1.0),
    "Iso-CTS": _fusion("ISO_CTS_Merge", "iso-cts", "--like", "paper", scaling_factor=1.0, common_space_fraction=0.8),
    "TSV-M": _fusion("TaskSingularVectorMerging", "tsv-m", "--like", "paper"),
    "WUDI": _fusion("WUDIMerging", "wudi", "--embeddings", "spectral", iter_num=300),
    "SVC": _fusion(
        "singular_value_calibration.SingularValueCalibrationArithmeticTask",
        *("svc", "--floor", "1", "--embeddings", "spectral"),
        corrects=("task-arithmetic", "--scale", "0.3"),
        scaling_factor=0.3,
        alpha=1.0,
    ),
    "EMR, elected vector": _fusion("emr_merge", "emr"),
    "weighted sum": _mecha("weighted_sum", "linear", "--weights", "0.7", "0.3", models=_TWO, alpha=0.3),
    "average of n": _mecha("n_average", "linear"),
    "spherical": _mecha(
        "slerp", "slerp", "--t", "0.3", models=_TWO, alpha=0.3, differs="it interpolates norms apart from directions"
    ),
    "train difference": _mecha("train_difference", "train-difference", models=_TWO),
    "cosine A": _mecha("add_cosine_a", "add-cosine", "--alpha", "0.2", models=_TWO, alpha=0.2),
    "cosine B": _mecha(
        "add_cosine_b", "add-cosine", "--alpha", "0.2", "--similarity", "combined", models=_TWO, alpha=0.2
    ),
    "geometric median": _mecha(
        "geometric_median",
        *("geometric-median", "--distance-scope", "tensor"),
        maxiter=1000,
        differs="its search ends where the sum of the distances stands still in float32",
    ),
    "Model Stock by rows": _mecha("model_stock", "model-stock", "--along", "rows", models=_TWO),
    "TIES by tensor": _mecha(
        "ties_sum",
        *("ties", "--density", "0.2", "--trim-scope", "tensor", "--vote", "count", "--divide-by", "count"),
        k=0.2,
        differs="it keeps one or two elements more of each tensor of each source",
    ),
}


def read(path: Path) -> Tensors:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def _by_fusion(case: Case, work: Path) -> Tensors:
    import torch
    from fusion_bench import method as algorithms
    from transformers import AutoModelForCausalLM

    models = {"_pretrained_": "base"} | {name: name for name in case.models}
    loaded = {name: AutoModelForCausalLM.from_pretrained(work / folder) for name, folder in models.items()}
    if case.algorithm == "emr_merge":
        from fusion_bench.method.emr_merging.utils import emr_merge

        base = {name: value.detach() for name, value in loaded.pop("_pretrained_").state_dict().items()}
        deltas = [{n: v.detach() - base[n] for n, v in model.state_dict().items()} for model in loaded.values()]
        update = emr_merge(deltas)[0]
        return {name: base[name] + update[name] for name in base}
    from fusion_bench.modelpool import BaseModelPool

    if case.algorithm in ("SlerpMergeAlgorithm", "SimpleAverageAlgorithm", "WeightedAverageAlgorithm"):
        del loaded["_pretrained_"]
    module, _, name = case.algorithm.rpartition(".")
    place = importlib.import_module(f"fusion_bench.method.{module}") if module else algorithms
    algorithm = getattr(place, name)(**case.settings or {})
    merged = algorithm.run(BaseModelPool(loaded))
    with torch.no_grad():
        return {name: value.detach().clone() for name, value in merged.state_dict().items()}


def _by_mecha(case: Case, work: Path) -> Tensors:
    import sd_mecha
    import torch
    from sd_mecha.extensions.builtin.merge_methods import ties

    base, *sources = [read(work / name) for name in ("base", *case.models)]
    settings = {name: torch.tensor(v) if name == "alpha" else v for name, v in (case.settings or {}).items()}
    merged = {}
    for name, anchor in base.items():
        values = [source[name] for source in sources]
        if case.algorithm in ("weighted_sum", "n_average"):
            function = getattr(sd_mecha, case.algorithm).__wrapped__
            merged[name] = function(*({name: value} for value in values), key=name, **settings)
        elif case.algorithm == "train_difference":
            mask = sd_mecha.train_difference_mask.__wrapped__(values[0], values[1], anchor, torch.tensor(1.0))
            merged[name] = values[0] + mask * (values[1] - anchor)
        elif case.algorithm in ("ties_sum", "model_stock"):
            function = getattr(ties, case.algorithm).__wrapped__
            merged[name] = anchor + function(*(value - anchor for value in values), **settings)
        else:
            merged[name] = getattr(sd_mecha, case.algorithm).__wrapped__(*values, **settings)
    return merged


def _run_peers(titles: Sequence[str], work: Path) -> None:
    """Each case by the other tool; what it raises is kept in place of a result."""
    from safetensors.torch import save_file

    for title in titles:
        case, folder = CASES[title], work / "theirs" / title
        folder.mkdir(parents=True)
        try:
            merged = (_by_fusion if case.tool == "FusionBench" else _by_mecha)(case, work)
        except Exception as problem:  # another tool's, of any kind
            (folder / "problem.txt").write_text(f"{type(problem).__name__}: {problem}")
            continue
        save_file({name: value.contiguous() for name, value in merged.items()}, folder / "model.safetensors")


def _make_models(work: Path) -> None:
    import torch

    from mergekit_px.testing import fine_tune, tiny_llama_config, tiny_llama_tensors, write_checkpoint

    shape = {"hidden": 48, "layers": 2, "vocabulary": 96}
    base = fine_tune(tiny_llama_tensors(**shape), seed=0, size=0.01)
    for number, name in enumerate(("base", *SOURCES)):
        tensors = base if name == "base" else fine_tune(base, seed=number, size=0.003)
        write_checkpoint(work / name, tensors, dtype=torch.float32, config=tiny_llama_config(**shape))


def _merge(case: Case, work: Path) -> Tensors:
    models = [work / name for name in case.models]
    if case.corrects:
        models = [_merged(case.corrects, models, work, work / "corrected"), *models]
    return read(_merged(case.line, models, work, work / "ours"))


def _merged(line: Sequence[str], models: Sequence[Path], work: Path, output: Path) -> Path:
    command = [sys.executable, "-m", "mergekit_px", *line, "--sources", *map(str, models)]
    if _needs_base(line[0]):
        command += ["--base", str(work / "base")]
    subprocess.run([*command, "-o", str(output), "--overwrite", "-q"], check=True, capture_output=True)
    return output


def _needs_base(verb: str) -> bool:
    from mergekit_px.methods import load_methods

    return load_methods()[verb.replace("-", "_")].space == "deltas"


def difference(ours: Tensors, theirs: Tensors, base: Tensors) -> tuple[float, int]:
    """The largest difference of a tensor over the largest change of it, and how many elements are not equal.

    Four float32 roundings of a tensor's largest element are left out: changes are much smaller than the weights.
    """
    largest, elements = 0.0, 0
    for name, value in ours.items():
        apart = ((value - theirs[name]).abs() - 4 * ROUNDING * value.abs().max()).clamp(min=0)
        shares = apart / (value - base[name]).abs().max().clamp(min=1e-12)
        largest = max(largest, float(shares.max()))
        elements += int((shares > EQUAL).sum())
    return largest, elements


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE", help="by title")
    parser.add_argument("--site", type=Path, help="a folder of packages that has both tools")
    parser.add_argument("--peers-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peers_in:
        return _run_peers(options.cases, options.peers_in)
    work = Path(tempfile.mkdtemp(prefix="pxmerge-other-tools-"))
    wrong = []
    try:
        site = options.site or work / "site"
        if options.site is None:
            install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
            subprocess.run([*install, *PEERS, *NEEDED], check=True)
        _make_models(work)
        base = read(work / "base")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(site)])}
        peers = [sys.executable, __file__, "--peers-in", str(work), "--cases", *options.cases]
        subprocess.run(peers, env=environment, check=True, capture_output=True)
        count = sum(value.numel() for value in base.values())
        print(f"| tool | algorithm | pxmerge | elements of {count} that differ | by at most | |", flush=True)
        print("|" + " --- |" * 6, flush=True)
        for title in options.cases:
            case, theirs = CASES[title], work / "theirs" / title
            if (problem := theirs / "problem.txt").exists():
                wrong.append(title)
                print(f"| {case.tool} | {title} | | | failed: {problem.read_text()[:200]} |", flush=True)
                continue
            share, elements = difference(_merge(case, work), read(theirs), base)
            if (share > EQUAL) != bool(case.differs):
                wrong.append(title)
            line = " ".join(case.line)
            print(f"| {case.tool} | {title} | `{line}` | {elements} | {share:.0e} | {case.differs} |", flush=True)
    finally:
        shutil.rmtree(work)
    if wrong:
        sys.exit(f"not as expected: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
