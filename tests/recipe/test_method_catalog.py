"""The declared methods as recipes see them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mergekit_px.methods import load_methods
from mergekit_px.plan.method_catalog import method_catalog


def test_every_declared_method_is_known() -> None:
    catalog = method_catalog()
    assert list(catalog.methods) == list(load_methods())
    for name, method in load_methods().items():
        facts = catalog.methods[name]
        assert list(facts.parameters) == list(method.params.model_fields)
        assert facts.summary == method.summary
        assert facts.per_source == method.per_source_fields()
        assert facts.presets == tuple(method.presets)
        for preset in method.presets.values():
            assert catalog.validate(name, preset) == []


def test_what_a_list_may_interpolate() -> None:
    methods = method_catalog().methods
    assert methods["slerp"].interpolated == {"t"}
    assert methods["ties"].interpolated == {"density", "scale"}
    assert methods["linear"].interpolated == frozenset()


def test_values_of_one_source() -> None:
    density = method_catalog().methods["ties"].parameters["density"]
    assert density["type"] == "number"
    assert (density["minimum"], density["maximum"]) == (0, 1)
    assert "anyOf" not in density


@pytest.mark.parametrize(
    ("method", "params", "found"),
    [
        ("ties", {"density": 0.5, "trim_scope": "tensor"}, []),
        ("ties", {"density": 1}, []),
        ("ties", {"density": 1.5}, [("density", "must be from 0 to 1")]),
        ("ties", {"density": "0.5"}, [("density", "must be a number")]),
        ("ties", {"density": True}, [("density", "must be a number")]),
        ("ties", {"trim_scope": "row"}, [("trim_scope", "must be 'model' or 'tensor'")]),
        ("linear", {"normalize": 1}, [("normalize", "must be true or false")]),
        ("slerp", {"t": -0.1}, [("t", "must be from 0 to 1")]),
    ],
)
def test_single_values(method: str, params: dict[str, object], found: list[tuple[str, str]]) -> None:
    assert method_catalog().validate(method, params) == found


def test_the_catalog_imports_no_torch() -> None:
    code = (
        "import sys; from mergekit_px.plan.method_catalog import method_catalog; "
        "method_catalog().methods; print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
