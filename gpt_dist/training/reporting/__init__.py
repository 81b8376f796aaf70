"""Where a run's numbers go: console, files, TensorBoard and pictures."""
