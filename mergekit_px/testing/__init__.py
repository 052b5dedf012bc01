"""For tests of merges and of merge methods, here and in other packages.

* :func:`write_checkpoint`, :func:`tiny_llama_tensors`, :func:`tiny_llama_config` and :func:`fine_tune` make small
  checkpoints, written by the ``safetensors`` package.
* :func:`apply_method` and :func:`merge_tensors` run a method plainly: all in memory, one block after another.
* :func:`check_method` runs a method through the conformance battery.
"""

from __future__ import annotations

from mergekit_px.testing.checkpoints import fine_tune, tiny_llama_config, tiny_llama_tensors, write_checkpoint
from mergekit_px.testing.conformance import check_method
from mergekit_px.testing.plain import apply_method, merge_tensors

__all__ = [
    "apply_method",
    "check_method",
    "fine_tune",
    "merge_tensors",
    "tiny_llama_config",
    "tiny_llama_tensors",
    "write_checkpoint",
]
