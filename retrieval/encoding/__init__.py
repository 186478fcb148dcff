"""Query text to vector: cache, Redis tier, batcher and encoder."""
