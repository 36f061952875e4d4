"""Measuring images and networks on the machine at hand, ours and those of other libraries on the same weights."""
