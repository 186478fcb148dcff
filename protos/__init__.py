"""The wire contract: ``retrieval.proto`` and the modules generated from it."""
