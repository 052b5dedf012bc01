"""YAML whose every part knows where it stands: recipes, mergekit configs and plans of transfers come through here."""
