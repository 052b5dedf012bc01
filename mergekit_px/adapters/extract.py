"""A low-rank adapter from a base and a fine-tune: the leading singular directions of each matrix's difference.

B = U S^1/2, A = S^1/2 V^T, alpha = r. What is no matrix and changed (norms, biases, a resized vocabulary) is saved
whole, so that at full rank the adapter gives the fine-tune back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergekit_px.adapters.components import kohya_prefix
from mergekit_px.adapters.lora_modules import LoraModule
from mergekit_px.adapters.save import Format, save_diffusers, save_kohya, save_peft
from mergekit_px.adapters.ties import is_vocabulary
from mergekit_px.checkpoint.contents import Checkpoint, StoredTensor
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.checkpoint.task_vector import MODEL_SPEC, description
from mergekit_px.checkpoint.whole import read_tensor
from mergekit_px.errors import AdapterError, TensorMismatchError, UsageError

if TYPE_CHECKING:
    import torch

    from mergekit_px.kernels.svd import SVD

    Load = Callable[[StoredTensor], torch.Tensor]

Rest = Literal["save", "drop", "error"]

_ARCHITECTURE = f"{MODEL_SPEC}architecture"
_OF_THE_FAMILY = (_ARCHITECTURE, *(f"{MODEL_SPEC}{key}" for key in ("sai_model_spec", "resolution", "prediction_type")))
"""What the header of a base says that is true of what is trained on it, and not its own title or author."""

_EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "wpe", "embed_in", "embed_positions", "tok_embeddings"}
    | {"word_embeddings", "position_embeddings", "token_type_embeddings"}
)
"""Modules whose weights are looked up by row."""


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """How much is kept.

    Attributes:
        rank: of every module; a mapping from globs on tensor names to ranks, the last match counting, gives each
            module its own (0 leaves it out).
        energy: instead: the smallest rank whose components hold this share of the squared norm.
        max_rank: bound where ``energy`` decides.
        rest: what happens to changed tensors that have no low-rank form.
        dtype: of the factors, a torch dtype's name.
    """

    rank: int | Mapping[str, int] | None = 16
    energy: float | None = None
    max_rank: int | None = None
    rest: Rest = "save"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise UsageError("give either a rank or a share of the energy")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"the share of the energy must be above 0 and at most 1, not {self.energy}")
        ranks = [self.rank] if isinstance(self.rank, int) else list((self.rank or {}).values())
        if any(rank < 0 for rank in ranks):
            raise UsageError(f"a rank must not be negative, got {min(ranks)}")


@dataclass(frozen=True)
class ModuleReport:
    """What became of one module: rank, share of the squared norm that is kept, Frobenius norm of the difference."""

    name: str
    rank: int
    captured_energy: float
    norm: float


@dataclass(frozen=True)
class ExtractedAdapter:
    """Low-rank factors and whole tensors, ready to be saved.

    Attributes:
        whole: changed tensors saved whole, by tensor name.
        dropped: changed tensors that were left out.
        described: what the header of the base says of it.
        parts: of a model in several folders, the folder of each tensor that is saved whole.
    """

    modules: list[LoraModule]
    reports: list[ModuleReport]
    whole: Mapping[str, torch.Tensor] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    described: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, str | None] = field(default_factory=dict)

    def save_file(self, path: Path, to: Format, *, overwrite: bool = False) -> None:
        """Write one file. Raises as save_kohya and save_diffusers, and AdapterError for what is saved whole."""
        if self.whole:
            raise AdapterError(
                f"{shown(next(iter(self.whole)))} changed and has no low-rank form ({len(self.whole)} such in all), and"
                f" the format of {to} has no place for it",
                hint="leave such tensors out with --rest drop, or write peft",
            )
        described = dict(self.described)
        if (architecture := described.get(_ARCHITECTURE)) is not None:
            described[_ARCHITECTURE] = f"{architecture}/lora"
        (save_kohya if to == "kohya" else save_diffusers)(path, self.modules, described=described, overwrite=overwrite)

    def save(self, folder: Path, *, base_model_name: str | None = None, overwrite: bool = False, **fields: Any) -> None:
        """Write a PEFT folder; ``fields`` go into the configuration. Raises as save_peft."""
        adapted = {module.name for module in self.modules}
        folders = {module.component for module in self.modules} | {self.parts.get(name) for name in self.whole}
        if len(folders) > 1:
            raise AdapterError(
                f"what changed is of {', '.join(sorted(str(folder) for folder in folders))}",
                hint="a PEFT adapter is of one part: choose it by --include 'FOLDER/*', or write kohya or diffusers",
            )
        biases = {name.rpartition("/")[2] for name in self.whole if name.endswith(".bias")}
        whole, saved = {}, set()
        for stored, tensor in self.whole.items():
            name = stored.rpartition("/")[2]
            owner, _, leaf = name.rpartition(".")
            infix = "base_layer." if owner in adapted else ""
            whole[f"base_model.model.{owner}.{infix}{leaf}"] = tensor
            if name not in biases:
                saved.add(owner)
        extra: dict[str, Any] = {"modules_to_save": sorted(saved) or None}
        if any(name.rpartition(".")[0] not in saved for name in biases):
            extra["bias"] = "all"
        save_peft(
            folder,
            self.modules,
            base_model_name=base_model_name,
            fan_in_fan_out=self.fan_in_fan_out,
            fields=extra | fields,
            whole=whole,
            overwrite=overwrite,
        )


def extract_adapter(
    base: Checkpoint,
    tuned: Checkpoint,
    options: ExtractOptions | None = None,
    *,
    load: Load | None = None,
) -> ExtractedAdapter:
    """Extract an adapter from the difference of two checkpoints; one tensor of each is held at a time.

    Raises TensorMismatchError for tensors that only one of the two has, or whose shapes differ (but for the rows of
    an embedding or a head), or that have no low-rank form while ``rest`` is ``error``.

    Args:
        load: what gives the tensors of the fine-tune, where they are not to be read as they are stored.
    """
    options = options or ExtractOptions()
    _check_names(base, tuned)
    with closing(open_reader(base)) as old, closing(open_reader(tuned)) as new:
        return _extract(base, tuned, options, partial(read_tensor, old), load or partial(read_tensor, new))


def _extract(
    base: Checkpoint, tuned: Checkpoint, options: ExtractOptions, load_base: Load, load_tuned: Load
) -> ExtractedAdapter:
    modules: list[LoraModule] = []
    reports: list[ModuleReport] = []
    whole: dict[str, torch.Tensor] = {}
    dropped: list[str] = []
    transposed = _stored_in_out(base)
    for name, tensor in tuned.tensors.items():
        new, old = load_tuned(tensor), load_base(base.tensors[name])
        if new.shape == old.shape and bool((new == old).all()):
            continue
        wanted = _wanted_rank(name, options)
        if wanted != 0 and new.shape == old.shape and _has_factors(name, tensor):
            module, report = _module(name, new, old, wanted, options, transposed=name in transposed)
            modules.append(_placed(module, base))
            reports.append(report)
        elif options.rest == "save" and wanted != 0:
            whole[name] = new
        elif options.rest == "error" and wanted != 0:
            raise TensorMismatchError(
                "the tensor changed and has no low-rank form",
                where=name,
                hint="leave such tensors out with --rest drop, or save them whole in a PEFT folder",
            )
        else:
            dropped.append(name)
    # a module is saved whole with all its tensors, changed or not
    for owner in {name.rpartition(".")[0] for name in whole if not name.endswith(".bias")}:
        for name in _siblings(owner, tuned):
            whole.setdefault(name, load_tuned(tuned.tensors[name]))
    described = {key: text for key, text in description(base.metadata).items() if key in _OF_THE_FAMILY}
    parts = {name: base.part_of(name) or None for name in whole}
    return ExtractedAdapter(modules, reports, whole, tuple(dropped), bool(transposed), described, parts)


def _module(
    name: str, new: torch.Tensor, old: torch.Tensor, wanted: int | None, options: ExtractOptions, *, transposed: bool
) -> tuple[LoraModule, ModuleReport]:
    import torch

    from mergekit_px.checkpoint.dtypes import parse_dtype
    from mergekit_px.kernels.svd import truncated_svd

    dtype = parse_dtype(options.dtype).torch
    delta = (new.double() - old.double()).float()
    embedding = _is_embedding(name)
    matrix = delta.T if transposed or embedding else delta.flatten(1)
    found = truncated_svd(matrix, wanted if options.energy is None else options.max_rank, label=name)
    if options.energy is not None:
        found = found.leading(_rank_of_energy(found, options.energy))
    root = found.s.sqrt()
    kernel = delta.shape[2:]
    a, b = (root[:, None] * found.v.T).to(dtype), (found.u * root).to(dtype)
    if kernel:
        a, b = a.reshape(found.rank, *delta.shape[1:]), b.reshape(*b.shape, *[1] * len(kernel))
    owner = name.rpartition(".")[0]
    module = LoraModule(owner, a, b, alpha=float(found.rank), embedding=embedding)
    return module, ModuleReport(owner, found.rank, found.captured_energy, float(torch.linalg.vector_norm(delta)))


def _placed(module: LoraModule, base: Checkpoint) -> LoraModule:
    """A module of a pipeline with its component, and its name within."""
    folder = base.part_of(module.name)
    if not folder:
        return module
    several = folder == "text_encoder" and "text_encoder_2" in base.parts
    prefix = kohya_prefix(folder, has_more_encoders=several) if several else None
    return replace(module, name=module.name.removeprefix(f"{folder}/"), component=folder, prefix=prefix)


def _rank_of_energy(found: SVD, share: float) -> int:
    """The smallest number of components that hold the share; at least one."""
    import torch

    reached = torch.cumsum(found.s.double().square(), 0) / found.energy
    # the sum of all components may fall short of the whole by rounding
    short = int((reached < min(share, float(reached[-1])) * (1 - 1e-12)).sum())
    return min(short + 1, found.rank)


def _wanted_rank(name: str, options: ExtractOptions) -> int | None:
    if not isinstance(options.rank, Mapping):
        return options.rank
    matching = [rank for glob, rank in options.rank.items() if fnmatchcase(name, glob)]
    return matching[-1] if matching else 0


def _has_factors(name: str, tensor: StoredTensor) -> bool:
    """Whether a tensor is the weight of a layer that LoRA knows."""
    if not name.endswith(".weight") or not tensor.dtype.arithmetic or 0 in tensor.shape:
        return False
    return len(tensor.shape) in (2, 3, 4, 5)


def _is_embedding(name: str) -> bool:
    parts = name.split(".")
    return len(parts) > 1 and parts[-2] in _EMBEDDINGS


def _stored_in_out(base: Checkpoint) -> set[str]:
    """The matrices that are stored (in, out), as GPT-2's: those whose bias has the length of their columns, and the
    square ones where there are such."""
    found, square = set(), set()
    for name, tensor in base.tensors.items():
        bias = base.tensors.get(f"{name.removesuffix('.weight')}.bias")
        if not name.endswith(".weight") or len(tensor.shape) != 2 or bias is None:
            continue
        if tensor.shape[0] == tensor.shape[1]:
            square.add(name)
        elif bias.shape == tensor.shape[1:]:
            found.add(name)
    return found | square if found else set()


def _siblings(owner: str, checkpoint: Checkpoint) -> Iterator[str]:
    return (name for name in checkpoint.tensors if name.rpartition(".")[0] == owner)


def _check_names(base: Checkpoint, tuned: Checkpoint) -> None:
    for one, other, label in ((base, tuned, tuned.label), (tuned, base, base.label)):
        missing: Sequence[str] = [name for name in one.tensors if name not in other.tensors]
        if missing:
            raise TensorMismatchError(f"{shown(missing[0])} is missing ({len(missing)} in all)", where=label)
    for name, tensor in tuned.tensors.items():
        shape = base.tensors[name].shape
        if shape != tensor.shape and not (is_vocabulary(name) and shape[1:] == tensor.shape[1:]):
            raise TensorMismatchError(
                f"{shown(name)} is {list(shape)} there and {list(tensor.shape)} here", where=tuned.label
            )
