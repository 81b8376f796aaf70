"""The gRPC services: requests in, responses and statuses out."""
