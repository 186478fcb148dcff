"""Benchmarks: each is one ``omni bench`` command that writes a JSON record and prints a table."""
