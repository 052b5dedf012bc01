"""Statistics of a model on data that merge methods read: Fisher information and Gram matrices.

They are written as one safetensors file: ``NAME.fisher`` in the shape of tensor NAME, ``NAME.gram`` as (n, n) for the
(m, n) weight NAME of a linear layer. All float32.
"""

from mergekit_px.learn.stats.fisher import Labels, fisher_information
from mergekit_px.learn.stats.gram import gram_matrices
from mergekit_px.learn.stats.run import StatsOptions, measure

__all__ = ["Labels", "StatsOptions", "fisher_information", "gram_matrices", "measure"]
