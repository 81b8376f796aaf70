"""gpt_dist: reproduce GPT-2 124M. Importing the package imports nothing else."""
