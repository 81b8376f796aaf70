"""A training run: the loop, what it starts from, and where its numbers go."""
