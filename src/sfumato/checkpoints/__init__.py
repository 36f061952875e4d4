"""Checkpoint files: finding, inspecting, loading and saving them."""
