"""Comparisons of methods, students and seeds."""
