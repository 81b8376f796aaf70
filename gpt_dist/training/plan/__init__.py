"""What a run needs, worked out without starting it: a file for each section of ``--dry-run``."""
