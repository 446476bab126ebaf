"""Image sources, transforms and reproducible batches."""
