"""Generated from proto/gpt_dist/v1 by proto/generate.sh."""
