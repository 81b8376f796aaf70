"""The gRPC server and its clients. This file imports nothing, so that clients start fast."""
