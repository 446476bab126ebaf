"""The training loop of any task, its checkpoints and its run folder."""
