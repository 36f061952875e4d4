"""Checkpoint files: where they are, what they hold, how they get into a model and back."""
