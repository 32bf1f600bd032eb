"""Pages that are written from the registry."""
