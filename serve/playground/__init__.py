"""A web page for a model: a prompt, sampling settings, and streaming replies side by side."""
