"""Benchmarks of ANN search, filters, builds and live updates."""
