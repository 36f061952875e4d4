"""The machine: devices and precision."""
