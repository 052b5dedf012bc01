"""A plan file to a checked `TransferPlan`; every error has its place in the file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_px.errors import RecipeError
from mergekit_px.learn.transfer.plan import Transfer, TransferPlan
from mergekit_px.learn.transfer.presets import PRESETS
from mergekit_px.learn.transfer.ranks import pair_ranks
from mergekit_px.located.nearest import hint_for
from mergekit_px.located.overrides import apply_overrides
from mergekit_px.located.places import Path as KeyPath
from mergekit_px.located.places import Places
from mergekit_px.located.validate import validate
from mergekit_px.located.yaml_text import Node, mapping, parse_yaml, read_text

_NAME = re.compile(r"\w[\w.-]{0,99}")


@dataclass(frozen=True)
class LoadedTransferPlan:
    """A checked plan, the text that it came from (overrides noted above it), and where its parts stand."""

    plan: TransferPlan
    text: str
    places: Places

    def where(self, *keys: str | int) -> str:
        """The place of a key path in the file, as ``plan.yaml:12:5``."""
        return self.places.key(keys)


def load_transfer_plan(path: str | Path, *, overrides: Sequence[str] = (), complete: bool = True) -> LoadedTransferPlan:
    """Read a plan. Paths in it are relative to the current directory.

    Args:
        overrides: ``key=value`` changes, as `mergekit_px.located.overrides` takes them.
        complete: whether pairs must be there; without, a plan that only names models will do.

    Raises:
        RecipeError: there is no such file, or it holds no plan that can be meant.
    """
    text = read_text(Path(path), "plan")
    root = parse_yaml(text, str(path))
    if not isinstance(root.value, dict):
        raise RecipeError("a plan is a mapping with models and transfers", where=str(path))
    if "pxmerge" in root.value or "merge_method" in root.value:
        raise RecipeError("this is a recipe, not a plan of a transfer", where=str(path), hint="use `pxmerge run`")
    root = _written_out(apply_overrides(root, overrides))
    places = Places(root)
    plan = validate(TransferPlan, root.data(), places, "the plan")
    _check(plan, places, complete=complete)
    text = "".join(f"# --set {' '.join(override.split())}\n" for override in overrides) + text
    return LoadedTransferPlan(plan, text, places)


def _written_out(root: Node) -> Node:
    """The tree with ``transfer:`` written as ``transfers:`` with one entry of that name."""
    assert isinstance(root.value, dict)
    single = root.value.get("transfer")
    if single is None:
        return root
    place = root.keys["transfer"]
    if "transfers" in root.value:
        raise RecipeError("a plan has either transfer or transfers", where=str(place))
    entries: dict[str, Node | None] = {name: node for name, node in root.value.items() if name != "transfer"}
    entries["transfers"] = mapping(place, {"transfer": single}, {"transfer": place})
    return mapping(root.place, entries, {**root.keys, "transfers": place})


def _check(plan: TransferPlan, places: Places, *, complete: bool) -> None:
    for part, names in (("models", list(plan.models)), ("transfers", list(plan.transfers))):
        if not names and (complete or part == "models"):
            raise RecipeError(f"'{part}' is empty", where=places.key((part,)))
        for name in names:
            if not _NAME.fullmatch(name):
                raise RecipeError(
                    f"'{name[:80]}' cannot be a name",
                    where=places.key((part, name)),
                    hint="names are letters, digits, '_', '-' and '.', and begin with a letter, a digit or '_'",
                )
    for name, model in plan.models.items():
        if model.weights is None and model.model is None:
            raise RecipeError(f"'models.{name}' names neither weights nor a model", where=places.key(("models", name)))
    for name, transfer in plan.transfers.items():
        _check_transfer(plan, transfer, ("transfers", name), places, complete=complete)


def _check_transfer(plan: TransferPlan, transfer: Transfer, path: KeyPath, places: Places, *, complete: bool) -> None:
    for key in ("target", "source"):
        name = getattr(transfer, key)
        if name is not None and name not in plan.models:
            raise RecipeError(
                f"there is no model '{name[:80]}'", where=places.value((*path, key)), hint=hint_for(name, plan.models)
            )
    if transfer.preset is not None and transfer.preset not in PRESETS:
        raise RecipeError(
            f"there is no preset '{transfer.preset[:80]}'",
            where=places.value((*path, "preset")),
            hint=hint_for(transfer.preset, PRESETS),
        )
    if transfer.adapter.form == "paper" and (transfer.adapter.kind == "mlp" or transfer.adapter.init == "zero"):
        what = (
            "the paper's form is attention with a normalised result: no mlp, and nothing that begins without a change"
        )
        raise RecipeError(what, where=places.value((*path, "adapter", "form")), hint="leave out kind and init")
    is_self = transfer.mode == "self"
    if is_self and transfer.source not in (None, transfer.target):
        what = "in mode self the source is the target"
        raise RecipeError(what, where=places.value((*path, "source")), hint="leave it out, or choose another mode")
    if not is_self and transfer.source is None:
        raise RecipeError(f"mode {transfer.mode} needs a source", where=places.key(path))
    if not is_self and transfer.source == transfer.target:
        what = "source and target are one model"
        raise RecipeError(what, where=places.value((*path, "source")), hint="within one model, write mode: self")
    if transfer.mode == "frozen" and transfer.source and plan.models[transfer.source].weights is None:
        what = f"mode frozen needs trained weights, and '{transfer.source}' has none"
        raise RecipeError(what, where=places.key(("models", transfer.source)), hint="add weights, or use mode: joint")
    for name in _learners(transfer):
        if complete and plan.models[name].data is None:
            what = f"model '{name}' learns in '{path[-1]}' and has no data"
            raise RecipeError(what, where=places.key(("models", name)), hint="add data: examples.npz")
    if complete and not transfer.pairs:
        where = places.key((*path, "pairs"))
        raise RecipeError("no tensors are paired", where=where, hint="`pxmerge pairs` lists tensors that can be")
    _check_pairs(transfer, path, places)


def _learners(transfer: Transfer) -> list[str]:
    """The models that train in a transfer."""
    both = transfer.mode in ("joint", "mutual") and transfer.source is not None
    return [transfer.target, transfer.source] if both and transfer.source else [transfer.target]


def _check_pairs(transfer: Transfer, path: KeyPath, places: Places) -> None:
    receivers: set[str] = set()
    givers: set[str] = set()
    ranks: dict[tuple[str, str], object] = {}
    for number, pair in enumerate(transfer.pairs):
        where = places.value((*path, "pairs", number))
        if pair.target in receivers:
            raise RecipeError(f"'{pair.target}' is the target of two pairs", where=where)
        if transfer.mode == "mutual" and pair.source in givers:
            raise RecipeError(f"'{pair.source}' is in two pairs, and in mode mutual it receives too", where=where)
        if transfer.mode == "self" and pair.source == pair.target:
            raise RecipeError(f"'{pair.target}' is paired with itself", where=where)
        receivers.add(pair.target)
        givers.add(pair.source)
        for side, rank in zip(("target", "source"), pair_ranks(pair, where), strict=True):
            owner = transfer.target if side == "target" or transfer.mode == "self" else "source"
            tensor = getattr(pair, side)
            if ranks.setdefault((owner, tensor), rank) != rank:
                what = f"'{tensor}' has one rank in this pair and another in one before it"
                raise RecipeError(what, where=where, hint="a tensor has one factorisation")
