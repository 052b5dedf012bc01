"""mergekit's YAML as a pxmerge recipe of the same meaning."""
