"""Fused retrieval: vectors, words and neighbouring queries in one answer."""
