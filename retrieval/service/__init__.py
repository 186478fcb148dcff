"""The calls of ``protos/retrieval.proto``: validation, query vector, search, response."""
