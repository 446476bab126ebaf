"""Trains a run of any task: the loop, its checkpoints, its log and its folder."""
