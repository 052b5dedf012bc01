"""JSON Schema of recipes, for editors: completion, help texts, and misspelt keys underlined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_px.recipe.catalog import MethodCatalog, MethodFacts
from mergekit_px.recipe.model import Recipe

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_LAYERS = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": r"^\s*([0-9]+\s*(-\s*[0-9]*)?\s*|none)$"},
        {"type": "array", "items": {"type": ["integer", "string"]}, "minItems": 1},
    ]
}
_WEIGHT = {
    "description": "A number, or a list of numbers, interpolated over the layers.",
    "anyOf": [{"type": ["number", "null"]}, {"type": "array", "items": {"type": "number"}, "minItems": 1}],
}


def recipe_schema(methods: MethodCatalog) -> dict[str, Any]:
    """The schema (2020-12) of a recipe in pxmerge's own form, with the parameters of each method."""
    schema = Recipe.model_json_schema(by_alias=True)
    _strip(schema)
    definitions: dict[str, Any] = schema["$defs"]
    _open_steps(definitions)
    for part, keys in (("Step", ("params", "like")), ("Rule", ("params",))):
        definitions[part]["properties"]["method"] = {
            "description": _description(definitions[part], "method"),
            "enum": [*methods.methods],
        }
        definitions[part]["allOf"] = [_arm(facts, keys) for facts in methods.methods.values()]
    definitions["Weight"] = _WEIGHT
    definitions |= {f"{name}_params": _parameters(facts) for name, facts in methods.methods.items()}

    definitions["Tokenizer"]["properties"]["pad_to"] = {
        "description": _description(definitions["Tokenizer"], "pad_to"),
        "type": "integer",
        "minimum": 1,
    }
    definitions["Tokenizer"]["properties"]["tokens"] |= {
        "additionalProperties": {"anyOf": [{"type": "string", "minLength": 1}, {"$ref": "#/$defs/TokenRow"}]}
    }
    _open_mixtures(definitions["Mixture"]["properties"])
    properties = schema["properties"]
    properties["models"] |= {
        "additionalProperties": {"anyOf": [{"type": "string", "minLength": 1}, {"$ref": "#/$defs/ModelInput"}]},
        "minProperties": 1,
    }
    properties["steps"] |= {"minProperties": 1}
    properties["merge"] = {"$ref": "#/$defs/Step", "description": "The one step of a recipe that has only one."}
    schema["required"] = ["models"]
    schema["oneOf"] = [{"required": ["steps"]}, {"required": ["merge"]}]
    return {"$schema": DIALECT, "title": "pxmerge recipe", **schema}


def _open_steps(definitions: dict[str, Any]) -> None:
    """Put what a recipe may say in place of what the models' types say, where types say too little."""
    step, rule, slice_source = (definitions[part] for part in ("Step", "Rule", "SliceSource"))
    weight = {"$ref": "#/$defs/Weight"}
    step["properties"]["sources"] = {
        "description": _description(step, "sources"),
        "anyOf": [
            {"type": "object", "additionalProperties": weight, "minProperties": 1},
            {"type": "array", "items": {"type": "string"}, "minItems": 1, "uniqueItems": True},
        ],
    }
    step["oneOf"] = [{"required": ["sources"]}, {"required": ["slices"]}]
    rule["properties"]["weights"] = {
        "description": _description(rule, "weights"),
        "anyOf": [{"type": "object", "additionalProperties": weight}, {"type": "array", "items": weight}],
    }
    slice_source["properties"]["weight"] = weight
    for part in (rule, slice_source):
        part["properties"]["layers"] = {**_LAYERS, "description": _description(part, "layers")}


def _open_mixtures(mixture: dict[str, Any]) -> None:
    """Text alone stands for an expert by its model, and for a router by its kind."""
    text: dict[str, Any] = {"type": "string", "minLength": 1}
    mixture["experts"] |= {"items": {"anyOf": [text, {"$ref": "#/$defs/Expert"}]}, "minItems": 1}
    for key, part in (("shared", "Expert"), ("router", "Router")):
        about = {"description": mixture[key]["description"]}
        mixture[key] = {**about, "anyOf": [text, {"$ref": f"#/$defs/{part}"}]}
    mixture["experts_per_token"] |= {"minimum": 1}


def _parameters(facts: MethodFacts) -> dict[str, Any]:
    return {
        "type": "object",
        "description": facts.summary,
        "additionalProperties": False,
        "properties": {name: _as_written(name, field, facts) for name, field in facts.parameters.items()},
    }


def _as_written(name: str, field: Mapping[str, Any], facts: MethodFacts) -> dict[str, Any]:
    """A parameter's schema, opened for lists over the layers and for values by source."""
    about = {key: value for key, value in field.items() if key in ("description", "default")}
    single = {key: value for key, value in field.items() if key not in about}
    arms: list[dict[str, Any]] = [single]
    if name in facts.interpolated:
        arms.append({"type": "array", "items": single, "minItems": 1})
    if name in facts.per_source:
        arms.append({"type": "object", "additionalProperties": {"anyOf": list(arms)}, "minProperties": 1})
    return {**about, "anyOf": arms} if len(arms) > 1 else {**about, **single}


def _arm(facts: MethodFacts, keys: Sequence[str]) -> dict[str, Any]:
    """What a step or rule of one method may have."""
    then: dict[str, Any] = {"params": {"$ref": f"#/$defs/{facts.name}_params"}}
    if "like" in keys:
        then["like"] = {"enum": [*facts.presets]} if facts.presets else False
    condition = {"properties": {"method": {"const": facts.name}}, "required": ["method"]}
    return {"if": condition, "then": {"properties": then}}


def _description(definition: Mapping[str, Any], name: str) -> str:
    return str(definition["properties"][name]["description"])


def _strip(schema: Any) -> None:
    """Remove what editors should not show: titles that repeat the field's name, and null as the value to fill in."""
    if isinstance(schema, dict):
        if isinstance(schema.get("title"), str):
            del schema["title"]
        if "default" in schema and schema["default"] is None:
            del schema["default"]
        for inner in schema.values():
            _strip(inner)
    elif isinstance(schema, list):
        for inner in schema:
            _strip(inner)
