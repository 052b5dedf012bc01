"""Coefficients of a recipe, chosen by a score."""
