"""What a training step costs and how long a run takes."""
