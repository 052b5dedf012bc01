"""Stage 2 of AXIS (arXiv:2508.19353): the singular values of a merged update are trained, its vectors stay."""
