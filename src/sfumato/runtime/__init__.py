"""The machine: which device, in which precision."""
