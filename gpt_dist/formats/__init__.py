"""File formats of other projects: Hugging Face's and llm.c's."""
