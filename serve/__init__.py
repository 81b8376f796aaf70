"""The gRPC server and its clients. It imports nothing of ours, so that clients start fast."""

import os

# Errors become one line of ours. Unless told otherwise, gRPC's core would print its own before it.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
