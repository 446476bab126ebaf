"""Weight files: reading, matching to a model, and their metadata."""
