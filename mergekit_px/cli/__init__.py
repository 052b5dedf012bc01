"""The command ``pxmerge``: one file for each verb; nothing imports this package."""

from __future__ import annotations

from mergekit_px.cli.app import main

__all__ = ["main"]
