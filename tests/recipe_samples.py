"""A recipe that uses every key, and a catalog of methods to check recipes against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_px.recipe.catalog import MethodFacts

RECIPE = """\
pxmerge: 1
models:                                   # names for the inputs; a path, org/name, or org/name@revision
  base: meta-llama/Llama-3.2-1B@main
  math: ./math-ft
  code: {model: org/code-ft, adapter: ./code-lora}      # a model with an adapter on top
steps:                                    # a graph; evaluated tensor by tensor, nothing is written in between
  mixed:
    method: ties
    base: base
    sources: {math: 0.6, code: 0.4}       # weights; or a plain list
    params: {density: 0.5}
    rules:                                # per tensor, later rules win; globs on names, layer ranges, or both
      - {match: "*.mlp.*", layers: 8-15, params: {density: 0.3}}
      - {match: "*norm*", method: linear}
      - {match: "lm_head.*", take: math}
  final: {method: slerp, sources: [mixed, base], params: {t: [0.0, 0.5, 0.3]}}   # list = interpolated over depth
output:
  from: final
  path: ./merged
  dtype: bfloat16
  shard_size: 5GB
  config_from: base
  push: {repo: org/merged, private: true}
"""

SHARE = {"type": "number", "minimum": 0, "maximum": 1}


class SampleMethods:
    """A few methods as a catalog, independent of those that are declared."""

    methods: Mapping[str, MethodFacts] = {
        facts.name: facts
        for facts in (
            MethodFacts("linear", parameters={"normalize": {"type": "boolean"}}),
            MethodFacts(
                "slerp",
                parameters={"t": SHARE},
                interpolated=frozenset({"t"}),
                sources=(2, 2),
                uses_weights=False,
            ),
            MethodFacts(
                "ties",
                parameters={"density": SHARE, "scope": {"enum": ["model", "tensor"]}, "ranks": {"type": "array"}},
                per_source=frozenset({"density"}),
                interpolated=frozenset({"density"}),
                presets=("mergekit", "peft"),
            ),
            MethodFacts("task_arithmetic"),
            MethodFacts("passthrough", sources=(1, 1), uses_weights=False),
        )
    }

    def validate(self, method: str, params: Mapping[str, Any]) -> list[tuple[str, str]]:
        problems = []
        for name, value in params.items():
            schema = self.methods[method].parameters[name]
            if schema is SHARE and (isinstance(value, (bool, str)) or value is None or not 0 <= value <= 1):
                problems.append((name, "must be from 0 to 1"))
            if "enum" in schema and value not in schema["enum"]:
                problems.append((name, f"must be one of {', '.join(schema['enum'])}"))
        return problems


METHODS = SampleMethods()
