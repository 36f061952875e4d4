"""Benchmarks of images and networks on this machine, for Sfumato and other libraries on the same weights."""
