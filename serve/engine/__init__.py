"""The engine: scheduling and computing, in terms of token ids."""
