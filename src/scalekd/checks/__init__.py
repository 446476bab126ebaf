"""What is checked before training starts."""
