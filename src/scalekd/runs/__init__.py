"""Runs from a recipe to a finished folder."""
