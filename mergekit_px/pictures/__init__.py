"""Numbers as pictures.

heat_map   a grid of numbers by module and layer, with a scale
curves     lines or points over one axis
drawing    both as a .png or .svg file, by matplotlib; the pages of ``pxmerge report`` draw the same by themselves
"""

from __future__ import annotations
