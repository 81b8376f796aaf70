"""Generated from proto/serve/inference by proto/generate.sh: the Open Inference Protocol."""
