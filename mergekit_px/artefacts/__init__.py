"""The small files that learning leaves behind and that merges apply: inputs of a plan like any other."""
