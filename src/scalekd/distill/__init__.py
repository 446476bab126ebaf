"""Distillation: the module of student, methods and frozen teachers, and the run that trains it."""
