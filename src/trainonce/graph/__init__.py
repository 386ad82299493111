"""Compute once: nodes named by what they compute, and the store of their results."""
