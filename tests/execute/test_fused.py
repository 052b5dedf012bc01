"""What is made by machine code has the bits that torch gives it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergekit_px import merge, merge_state_dicts
from mergekit_px.errors import NonFiniteError
from mergekit_px.execute.fused import FusedItems
from mergekit_px.kernels import native

pytestmark = pytest.mark.skipif(not native.is_available(), reason="no llvmlite, or no fused multiply-add")

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# Method, parameters, variant, number of sources, whether over a base. Each stands for its kin.
CASES: list[tuple[str, dict[str, Any], str | None, int, bool]] = [
    ("linear", {}, None, 3, False),
    ("linear", {"normalize": False, "precision": "float64"}, None, 2, False),
    ("combine", {}, None, 4, False),
    ("task_arithmetic", {"scale": 0.7}, None, 3, True),
    ("task_arithmetic", {"normalize": True}, None, 1, True),
    ("slerp", {"t": 0.3}, None, 2, False),
    ("karcher", {}, None, 3, False),
    ("model_stock", {}, None, 3, True),
    ("ties", {"density": 0.4}, None, 3, True),
    ("ties", {"density": 0.4, "vote": "count", "rescale": "l1"}, "mergekit", 3, True),
    ("ties", {"density": 0.7, "scale": 0.4}, "peft", 2, True),
    ("dare_linear", {"density": 0.37}, None, 2, True),
    ("dare_ties", {"density": 0.6}, None, 3, True),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.1}, None, 2, True),
    ("breadcrumbs_ties", {"density": 0.5, "gamma": 0.1}, None, 3, True),
    ("nearswap", {"t": 0.01}, None, 1, True),
    ("magmax", {}, None, 3, True),
    ("emr", {}, None, 3, True),
    ("consensus_ta", {}, None, 3, True),
    ("fedgma", {}, None, 3, True),
]


def _states(seed: int, count: int, dtypes: list[torch.dtype]) -> list[dict[str, torch.Tensor]]:
    """Tensors of odd sizes; fine-tunes of a base, many of whose elements are those of the base."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"scalar": (), "vector": (5,), "matrix": (37, 41), "block": (3, 16, 16), "long": (70_001,)}
    states = []
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for number in range(count):
        drift = {name: torch.randn(shape, generator=generator).clamp(-1, 0.4) * 0.1 for name, shape in shapes.items()}
        state = {name: value + (drift[name].clamp(min=-0.05) if number else 0) for name, value in base.items()}
        states.append({name: value.to(dtypes[number % len(dtypes)]) for name, value in state.items()})
    return states


@pytest.mark.parametrize(("method", "params", "like", "count", "based"), CASES)
def test_the_bits_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, method: str, params: dict[str, Any], like: str | None, count: int, based: bool
) -> None:
    used = []
    compiled = native.compiled
    monkeypatch.setattr(native, "compiled", lambda *args: used.append(args[1]) or compiled(*args))
    generator = torch.Generator().manual_seed(len(method))
    for seed, (dtypes, out) in enumerate([([BF16], BF16), ([F16, F32], F16), ([F32, BF16], F32), ([F64, F32], F64)]):
        base, *sources = _states(seed, count + 1, dtypes)
        # Some weights are ratios of small integers, whose sums are exact; others are not.
        weights = (
            None
            if method in ("slerp", "model_stock", "nearswap", "magmax", "emr")
            else torch.rand(count, generator=generator)
        )
        if weights is not None:
            weights = [0.5, 0.3, 0.3, -0.1][:count] if seed == 0 else weights.tolist()
            if method == "combine":  # gives a model only if they add up to 1
                weights[-1] = 1 - sum(weights[:-1])

        def merged(
            base: Any = base, sources: Any = sources, weights: Any = weights, out: Any = out
        ) -> dict[str, torch.Tensor]:
            return merge_state_dicts(
                sources,
                method,
                base=base if based else None,
                weights=weights,
                **params,
                like=like,
                dtype=out,
                seed=7,
            )

        used.clear()
        fused = merged()
        stored = [output for output in used if isinstance(output, str)]
        assert len(stored) == len(base), "not all of it was made by machine code"
        # So are statistics, of a tensor or of the model, unless something is float64.
        swept = method in ("ties", "breadcrumbs", "breadcrumbs_ties", "slerp", "karcher", "model_stock")
        assert (len(used) >= 2 * len(base)) == (swept and F64 not in dtypes)
        with monkeypatch.context() as without:
            without.setattr(native, "is_available", lambda: False)
            used.clear()
            expected = merged()
        assert not used
        for name, value in expected.items():
            assert fused[name].dtype == out
            assert (
                fused[name].view(torch.uint8).equal(value.view(torch.uint8))
                if value.ndim
                else (fused[name].item() == value.item())
            ), f"{name} from {dtypes} to {out}"


@pytest.mark.parametrize(
    ("codes", "scales"),
    [
        (torch.float8_e4m3fn, F32),
        (torch.float8_e4m3fn, torch.float8_e8m0fnu),
        (torch.float8_e5m2, BF16),
        (torch.int8, F16),
    ],
)
def test_scaled_codes_are_decoded_with_the_bits_of_torch(
    monkeypatch: pytest.MonkeyPatch, codes: torch.dtype, scales: torch.dtype
) -> None:
    used = []
    computation = FusedItems.computation
    monkeypatch.setattr(
        FusedItems, "computation", lambda *args, **more: used.append(computation(*args, **more)) or used[-1]
    )
    grids = {(256, 384): [(1,), (256, 1), (2, 3)], (100, 160): [(1, 2)], (3, 128, 256): [(3, 1, 2), (3,), (3, 128, 1)]}
    generator = torch.Generator().manual_seed(1)

    def state() -> dict[str, torch.Tensor]:
        made = {}
        for shape, grid in [(shape, grid) for shape, several in grids.items() for grid in several]:
            every = torch.randint(0, 256, shape, generator=generator).to(torch.uint8).view(codes)  # subnormals too
            name = f"{len(made)}.weight"
            made[name] = torch.where(every.float().isfinite(), every.float(), 0.0).to(codes)
            made[f"{name}_scale"] = 2.0 ** -torch.rand(grid, generator=generator).mul(9).add(3)
            made[f"{name}_scale"] = made[f"{name}_scale"].to(scales)
        return made

    base, *sources = state(), state(), state()
    for method, more in (
        ("linear", {}),
        ("linear", {"precision": "float64"}),
        ("ties", {"base": base, "density": 0.4}),
    ):
        used.clear()
        fused = merge_state_dicts(sources, method, dtype=BF16, **more)
        assert used and None not in used
        with monkeypatch.context() as without:
            without.setattr(native, "is_available", lambda: False)
            expected = merge_state_dicts(sources, method, dtype=BF16, **more)
        assert all(fused[name].view(torch.int16).equal(expected[name].view(torch.int16)) for name in expected)


def test_what_is_not_finite_is_told_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _states(0, 2, [F32])
    second["matrix"][3, 5] = float("nan")
    messages = []
    for available in (True, False):
        monkeypatch.setattr(native, "is_available", lambda available=available: available)
        with pytest.raises(NonFiniteError) as caught:
            merge_state_dicts([first, second], "linear")
        messages.append(str(caught.value))
        large = {name: torch.full_like(value, 70_000) for name, value in first.items()}
        with pytest.raises(NonFiniteError, match="does not fit F16"):
            merge_state_dicts([large, large], "linear", dtype=F16)
    assert messages[0] == messages[1]
    assert "matrix" in messages[0]


def test_a_merge_by_elements_does_not_load_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *sources = _states(0, 3, [BF16])
    generator = torch.Generator().manual_seed(1)
    for name, state in {"base": base, "one": sources[0], "two": sources[1]}.items():
        state["several blocks"] = torch.randn(600_007, generator=generator).to(BF16)
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    code = (
        "import sys\n"
        "from mergekit_px import merge\n"
        "models = ['one', 'two']\n"
        "merge(models, 'linear', output='linear')\n"
        "merge(models, 'dare_linear', base='base', output='dare')\n"
        "merge(models, 'slerp', output='slerp')\n"
        "merge(models, 'ties', base='base', output='ties')\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    monkeypatch.setattr(native, "is_available", lambda: False)
    merge([str(tmp_path / "one"), str(tmp_path / "two")], "slerp", output=str(tmp_path / "by torch"))
    files = [tmp_path / name / "model.safetensors" for name in ("slerp", "by torch")]
    assert files[0].read_bytes() == files[1].read_bytes()
