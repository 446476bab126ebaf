"""Distillation recipes: fields, validation, shipped files."""
