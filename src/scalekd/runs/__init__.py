"""Takes a recipe to a finished folder: check, train, export, report."""
