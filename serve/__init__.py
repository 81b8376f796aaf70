"""serve: the gRPC server and its clients. Importing the package imports nothing else."""
