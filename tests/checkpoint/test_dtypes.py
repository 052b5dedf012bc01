"""The dtype table against torch, the reference writer and the formats themselves."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mergekit_px.checkpoint.dtypes import DTYPES, byte_count, dtype_of, parse_dtype
from mergekit_px.errors import InputError, MalformedCheckpointError, UsageError

WITH_TORCH = [dtype for dtype in DTYPES.values() if dtype.torch_name is not None]


def test_all_types_of_the_format_are_there() -> None:
    assert set(DTYPES) == set(
        [
            "BOOL",
            "F4",
            "F6_E2M3",
            "F6_E3M2",
            "U8",
            "I8",
            "F8_E5M2",
            "F8_E4M3",
            "F8_E8M0",
            "F8_E4M3FNUZ",
            "F8_E5M2FNUZ",
            "I16",
            "U16",
            "F16",
            "BF16",
            "I32",
            "U32",
            "F32",
            "C64",
            "F64",
            "I64",
            "U64",
        ]
    )
    assert all(name == dtype.name for name, dtype in DTYPES.items())


@pytest.mark.parametrize("dtype", WITH_TORCH, ids=str)
def test_torch_type_has_the_same_bits_and_name_in_a_file(dtype, tmp_path) -> None:
    pairs = 2 if dtype.bits == 4 else 1
    assert dtype.torch.itemsize * 8 == dtype.bits * pairs
    assert dtype_of(dtype.torch) is dtype
    save_file({"x": torch.zeros(4, dtype=torch.uint8).repeat(8).view(dtype.torch)}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.get_slice("x").get_dtype() == dtype.name


@pytest.mark.parametrize("dtype", [each for each in WITH_TORCH if each.kind == "float" and each.bits >= 8], ids=str)
def test_max_finite_is_what_torch_says(dtype) -> None:
    assert dtype.max_finite == torch.finfo(dtype.torch).max


@pytest.mark.parametrize(
    ("name", "exponent", "mantissa", "bias"), [("F4", 2, 1, 1), ("F6_E2M3", 2, 3, 1), ("F6_E3M2", 3, 2, 3)]
)
def test_max_finite_of_the_narrow_types(name, exponent, mantissa, bias) -> None:
    # These formats have neither infinities nor NaN, so the largest code is the largest number.
    assert DTYPES[name].max_finite == 2.0 ** (2**exponent - 1 - bias) * (2 - 2.0**-mantissa)


@pytest.mark.parametrize("dtype", [each for each in DTYPES.values() if each.arithmetic], ids=str)
def test_arithmetic_means_torch_converts_there_and_back(dtype) -> None:
    ones = torch.ones(3, dtype=torch.float32).to(dtype.torch)
    assert torch.equal(ones.to(torch.float32), torch.ones(3))


def test_what_is_not_arithmetic() -> None:
    assert {each.name for each in DTYPES.values() if each.kind == "float" and not each.arithmetic} == {
        "F4",
        "F6_E2M3",
        "F6_E3M2",
        "F8_E8M0",
    }
    assert not any(each.arithmetic for each in DTYPES.values() if each.kind != "float")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("BF16", "BF16"),
        ("bf16", "BF16"),
        ("bfloat16", "BF16"),
        ("torch.bfloat16", "BF16"),
        (" half ", "F16"),
        ("float", "F32"),
        ("fp32", "F32"),
        ("double", "F64"),
        ("float8_e4m3fn", "F8_E4M3"),
        ("F8_E4M3FNUZ", "F8_E4M3FNUZ"),
        ("long", "I64"),
        ("bool", "BOOL"),
    ],
)
def test_spellings(text, name) -> None:
    assert parse_dtype(text) is DTYPES[name]


def test_misspelt_dtype_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown dtype 'bfloat61'; did you mean bfloat16"):
        parse_dtype("bfloat61")
    with pytest.raises(UsageError, match="give one such as"):
        parse_dtype("zzzzzz")


def test_byte_count() -> None:
    assert byte_count(DTYPES["BF16"], (3, 5)) == 30
    assert byte_count(DTYPES["F32"], ()) == 4
    assert byte_count(DTYPES["F32"], (7, 0)) == 0
    assert byte_count(DTYPES["F4"], (3, 2)) == 3
    assert byte_count(DTYPES["F6_E2M3"], (4,)) == 3
    for name, shape in [("F4", (3,)), ("F6_E3M2", (2,)), ("F4", ())]:
        with pytest.raises(MalformedCheckpointError, match="whole bytes"):
            byte_count(DTYPES[name], shape)
    assert byte_count(DTYPES["U8"], (2**40, 2**40)) == 2**80


def test_no_torch_type_is_an_error_not_a_guess() -> None:
    with pytest.raises(InputError, match="F6_E2M3"):
        _ = DTYPES["F6_E2M3"].torch
    with pytest.raises(InputError, match="complex128"):
        dtype_of(torch.complex128)


def test_table_is_finite_and_positive() -> None:
    for dtype in DTYPES.values():
        assert (dtype.max_finite is not None) == (dtype.kind == "float")
        assert dtype.max_finite is None or (math.isfinite(dtype.max_finite) and dtype.max_finite > 0)


def test_reading_headers_needs_no_torch() -> None:
    modules = [
        "dtypes",
        "header",
        "index",
        "open",
        "reader",
        "layout",
        "writer",
        "side_files",
        "fingerprint",
        "task_vector",
        "hashing",
        "pickled",
    ]
    lines = [f"import mergekit_px.checkpoint.{module}" for module in modules]
    code = ";".join([*lines, "import sys", "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"])
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
