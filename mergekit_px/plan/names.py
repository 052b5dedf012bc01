"""Names of one model in two spellings: compared whole, and bridged where that is possible in one way only."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.errors import RecipeError, TensorMismatchError
from mergekit_px.plan.layers import split_layer
from mergekit_px.plan.nodes import Node

_RESPELLINGS = (
    (re.compile(r"\.gamma$"), ".weight"),
    (re.compile(r"\.beta$"), ".bias"),
    (re.compile(r"\.default\."), "."),
    (re.compile(r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\.)+"), r"\1"),
)
"""Of old layer norms (TensorFlow's names in early transformers), of the adapter that PEFT names by itself, and of
wrappers that torch and PEFT put around modules wherever they are."""

_WRAPPERS = frozenset(
    {
        *("module", "model", "base_model", "language_model", "text_model", "transformer", "backbone"),
        *("bert", "roberta", "distilbert", "electra", "albert", "deberta", "camembert", "xlm_roberta", "gpt_neox"),
    }
)
"""Modules that only wrap others, so that one model is stored with and without them."""

_OF_TRAINING = re.compile(
    r"^(module|base_model\.model)\.|(?:^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""Wrappers of training, without which models are loaded."""

_RULES = 4
"""Prefixes that may differ in one pair of models, as those of the layers and of the head."""


@dataclass(frozen=True)
class Bridge:
    """How a model's names stand for those of another.

    Attributes:
        names: name in the reference -> name in the model, where they differ.
        rules: (prefix in the model, prefix in the reference) of each change, likeliest first.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    rules: tuple[tuple[str, str], ...] = ()

    def describe(self) -> str:
        """The changes, for a note."""
        changes = [f"'{old}*' as '{new}*'" if old or new else "old spellings of parameters" for old, new in self.rules]
        return ", ".join(changes)


def bridge(reference: Mapping[str, Node], model: Mapping[str, Node]) -> Bridge:
    """The one way in which names of the model are those of the reference; empty where there is none or are several.

    Only names that the other lacks are looked at; two names go together where their shapes agree but for the rows.
    """
    lacking = [name for name in reference if name not in model]
    missing = {_plain(name): name for name in lacking}
    surplus = [name for name in model if name not in reference]
    if len(missing) < len(lacking):
        return Bridge()
    names: dict[str, str] = {}
    rules: list[tuple[str, str]] = []
    whole = len(surplus) == len(model) and len(lacking) == len(reference) == len(model)
    while missing and surplus and len(rules) < _RULES:
        found = _likeliest(missing, surplus) or (_prefix_of_all(missing, surplus) if whole and not rules else None)
        if found is None:
            break
        old, new = found
        pairs = {}
        for name in surplus:
            target = missing.get(new + _plain(name)[len(old) :]) if _plain(name).startswith(old) else None
            if target is not None and _fits(reference[target], model[name]):
                if target in pairs:
                    return Bridge()
                pairs[target] = name
        if not pairs:
            break
        names |= pairs
        rules.append(found)
        missing = {plain: name for plain, name in missing.items() if name not in pairs}
        taken = set(pairs.values())
        surplus = [name for name in surplus if name not in taken]
    return Bridge(names, tuple(rules))


def in_all_layers(names: Mapping[str, str], model: Mapping[str, Node]) -> dict[str, str]:
    """How a model's names stand for those of another that has fewer layers; names: those that both have."""
    known = {}
    for name, own in names.items():
        there, here = split_layer(name), split_layer(own)
        if there is not None and here is not None:
            known[here.stack, here.suffix] = there.stack, there.suffix
    layers = [(name, found) for name in model if (found := split_layer(name)) is not None]
    further = [(name, found.layer, known.get((found.stack, found.suffix))) for name, found in layers]
    return {f"{new[0]}{layer}{new[1]}": name for name, layer, new in further if new is not None} | dict(names)


def respelled(nodes: Mapping[str, Node], names: Mapping[str, str]) -> Mapping[str, Node]:
    """Tensors under the names of another spelling; names: of that one -> of this."""
    there = {own: name for name, own in names.items()}
    return {there.get(name, name): node for name, node in nodes.items()}


def alone(
    one: tuple[str, Mapping[str, Node]], other: tuple[str, Mapping[str, Node]], found: Bridge, policy: str, where: str
) -> str | None:
    """What to say of tensors that only one of two models has, where a policy allows for that.

    Raises:
        TensorMismatchError: almost none is in both.
    """
    (first, reference), (second, own) = one, other
    common, fewer = len(found.names) + sum(name in reference for name in own), min(len(reference), len(own))
    if common <= fewer // 20:
        raise TensorMismatchError(
            f"'{first}' and '{second}' have {common} of {fewer} names in common, so `{policy}` would merge nothing; "
            + difference(reference, own),
            where=where,
            hint=rename_hint(reference, own) or "check that the models fit together",
        )
    left = len(reference) + len(own) - 2 * common
    return f"{left} tensors are only in one of '{first}' and '{second}' (`{policy}`)" if left else None


def renamed(nodes: Mapping[str, Node], patterns: Mapping[str, str], where: str) -> dict[str, Node]:
    """Tensors under the names that the recipe gives them; of several patterns that match, the last counts.

    Raises:
        RecipeError: a pattern that matches nothing, a star on one side only, or two tensors of one name.
    """
    compiled = []
    for pattern, target in patterns.items():
        if pattern.count("*") != target.count("*"):
            raise RecipeError(
                f"rename {shown(pattern)}: {shown(target)} has another number of '*'",
                where=where,
                hint="each * keeps what it matches, in order",
            )
        expression = re.compile("(.*)".join(re.escape(part) for part in pattern.split("*")), re.DOTALL)
        compiled.append((pattern, expression, target.split("*")))
    used: set[str] = set()
    result: dict[str, Node] = {}
    origin: dict[str, str] = {}
    for name, node in nodes.items():
        new = name
        for pattern, expression, parts in compiled:
            found = expression.fullmatch(name)
            if found is not None:
                used.add(pattern)
                kept = [*found.groups(), ""]
                new = "".join(part + kept[place] for place, part in enumerate(parts))
        if new in result:
            raise RecipeError(
                f"rename gives {shown(origin[new])} and {shown(name)} the one name {shown(new)}", where=where
            )
        result[new], origin[new] = node, name
    for pattern in patterns:
        if pattern not in used:
            raise RecipeError(
                f"rename {shown(pattern)} matches none of the model's {len(nodes)} tensors",
                where=where,
                hint=f"one of them is {shown(next(iter(nodes), ''))}",
            )
    return result


def wrapped(names: Collection[str]) -> list[str]:
    """What to say of a result whose names hold a wrapper of training."""
    found = Counter(match[1] or match[2] for name in names if (match := _OF_TRAINING.search(name)) is not None)
    if not found:
        return []
    wrapper = found.most_common(1)[0][0]
    pattern = f'"*{wrapper}.*": "**"' if wrapper.startswith("_") else f'"{wrapper}.*": "*"'
    return [
        f"{found.total()} of {len(names)} names hold {shown(wrapper)} or the like, a wrapper of training that programs"
        f" which load models do not know; to leave it out, give each model rename: {{{pattern}}}"
    ]


def difference(reference: Mapping[str, Node], model: Mapping[str, Node]) -> str:
    """How many names two models share, and by what the others differ, in one clause."""
    common = sum(name in model for name in reference)
    text = f"{common} of {len(reference)} names are in both (the other has {len(model)})"
    surplus = _patterns(name for name in model if name not in reference)
    missing = _patterns(name for name in reference if name not in model)
    if missing:
        text += f"; only the first has {missing}"
    if surplus:
        text += f"; only the second has {surplus}"
    return text


def rename_hint(reference: Mapping[str, Node], model: Mapping[str, Node]) -> str | None:
    """The ``rename:`` line that would bring most of a model's other names to those of the reference."""
    missing = {name for name in reference if name not in model}
    surplus = [name for name in model if name not in reference]
    if not missing or not surplus:
        return None
    rules, _ = _candidates(missing, surplus, known=False)
    if not rules:
        return None
    (old, new), count = rules.most_common(1)[0]
    return f'rename: {{"{old}*": "{new}*"}} would bring {count} of them together' if count > 1 else None


def _fits(one: Node, other: Node) -> bool:
    return len(one.shape) == len(other.shape) and one.shape[1:] == other.shape[1:]


def _plain(name: str) -> str:
    for pattern, replacement in _RESPELLINGS:
        name = pattern.sub(replacement, name)
    return name


def _likeliest(missing: Iterable[str], surplus: Iterable[str]) -> tuple[str, str] | None:
    """The change of prefix that explains most names; None where two explain as many of the same names."""
    rules, sources = _candidates(missing, surplus, known=True)
    if not rules:
        return None
    ranked = rules.most_common()
    best, count = ranked[0]
    for rule, other in ranked[1:]:
        if other < count:
            break
        if rule[0] == best[0] or sources[rule] & sources[best]:
            return None
    return best


def _prefix_of_all(missing: Iterable[str], surplus: Iterable[str]) -> tuple[str, str] | None:
    """The one prefix, of whatever name, that all names of one model have more than those of the other."""
    short, long = sorted(missing), sorted(map(_plain, surplus))
    for one, other, turned in ((short, long, False), (long, short, True)):
        prefix = other[0].removesuffix(one[0])
        if prefix.endswith(".") and other == [prefix + name for name in one]:
            return ("", prefix) if turned else (prefix, "")
    return None


def _candidates(
    missing: Iterable[str], surplus: Iterable[str], *, known: bool
) -> tuple[Counter[tuple[str, str]], dict[tuple[str, str], set[str]]]:
    """Changes of prefix, as short as they can be, with how many names each explains and which.

    Args:
        known: only such that add or take away wrapping modules.
    """
    by_rest: dict[str, list[str]] = {}
    for name in missing:
        for prefix, rest in _splits(name):
            by_rest.setdefault(rest, []).append(prefix)
    rules: Counter[tuple[str, str]] = Counter()
    sources: dict[tuple[str, str], set[str]] = {}
    for name in surplus:
        seen = set()
        for old, rest in _splits(_plain(name)):
            for new in by_rest.get(rest, ()):
                rule = _shortest(old, new)
                if rule not in seen and (not known or _is_wrapping(rule)):
                    seen.add(rule)
                    rules[rule] += 1
                    sources.setdefault(rule, set()).add(name)
    return rules, sources


def _splits(name: str) -> Iterable[tuple[str, str]]:
    """A name parted behind none, one, two or three of its modules, never behind a number."""
    parts = name.split(".")
    for count in range(min(4, len(parts))):
        if count and parts[count - 1].isdigit():
            break
        yield "".join(f"{part}." for part in parts[:count]), ".".join(parts[count:])


def _shortest(old: str, new: str) -> tuple[str, str]:
    """The change without the modules that both prefixes end in."""
    before, after = old.split(".")[:-1], new.split(".")[:-1]
    while before and after and before[-1] == after[-1]:
        before.pop()
        after.pop()
    return "".join(f"{part}." for part in before), "".join(f"{part}." for part in after)


def _is_wrapping(rule: tuple[str, str]) -> bool:
    return all(part in _WRAPPERS for prefix in rule for part in prefix.split(".")[:-1])


def _patterns(names: Iterable[str]) -> str:
    """The commonest beginnings of some names, with how many each stands for."""
    counts = Counter(".".join(name.split(".")[:2]) + (".*" if name.count(".") > 1 else "") for name in names)
    listed = [f"{pattern} ({count})" for pattern, count in counts.most_common(2)]
    return ", ".join(listed) + (" and more" if len(counts) > 2 else "")
