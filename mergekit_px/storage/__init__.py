"""How values are kept: encodings of quantised tensors, recognised from names, dtypes and shapes, and decoded."""
