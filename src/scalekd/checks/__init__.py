"""The pre-flight: checks before training starts."""
