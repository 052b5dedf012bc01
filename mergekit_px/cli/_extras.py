"""The optional packages, by the extra of pyproject.toml that brings them."""

from __future__ import annotations

EXTRAS = {
    "models": ("transformers",),
    "align": ("scipy",),
    "search": ("cma", "optuna"),
    "evaluate": ("transformers", "accelerate", "lm_eval"),
    "parquet": ("pyarrow",),
    "images": ("PIL",),
    "plot": ("matplotlib",),
    "fast": ("llvmlite",),
    "s3": ("s3fs",),
    "remote": ("s3fs", "gcsfs", "adlfs"),
    "cluster": ("ray",),
    "demo": ("transformers", "sklearn", "scipy", "matplotlib"),
}
"""Extra -> the modules that it brings; the narrower extras come first."""


def extra_of(module: str) -> str | None:
    """The extra to install for a module that is missing; None for one that no extra brings."""
    return next((extra for extra, modules in EXTRAS.items() if module in modules), None)
