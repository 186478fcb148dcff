"""Releases to answers: the gRPC service, query cache, batching, clients, web page and the ``omni`` command."""
