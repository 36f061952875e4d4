"""Builders: pure functions from a noise grid to the rows of one sampler, in float64 and without tensors."""
