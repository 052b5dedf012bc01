"""What a settings class says of its fields: read once for commands, schemas, pages and messages alike."""
