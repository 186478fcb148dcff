"""Relevance that is judged: a blinded sample of results, judges, and what their grades say."""
