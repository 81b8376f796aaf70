"""Checkpoints: their files, how they are written, found and read."""
