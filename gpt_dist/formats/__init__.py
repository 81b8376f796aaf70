"""Other projects' file formats."""
