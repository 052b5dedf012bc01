"""Coefficients of task vectors, one for each model and block of parameters, learned from a little data.

The parametrisation is anisotropic scaling (aTLAS, arXiv 2407.02880); what it is learned by is distillation from the
ensemble of the models (OFASD), labels (aTLAS), the entropy of predictions (AdaMerging, arXiv 2310.02575) or the loss
on data to be forgotten. ``method: anisotropic`` applies what was learned.
"""
