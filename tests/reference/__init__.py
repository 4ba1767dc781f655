"""Slow, plain references of the merge methods, written from the design alone, without the kernels in view."""
