"""Analyses of trained models: frequencies, feature distances, similarity, probing."""
