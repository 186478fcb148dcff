"""gRPC over HTTP/2: one protocol object a connection, no task and no copy for instant answers."""
