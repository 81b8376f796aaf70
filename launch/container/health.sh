#!/bin/sh
# A server is healthy if it reports SERVING; any other command, as long as it runs. Host, port and TLS
# are those of the server's own flags and environment.
exec python -m serve.probe --timeout 4
