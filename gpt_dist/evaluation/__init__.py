"""Validation loss, and scores on benchmarks."""
