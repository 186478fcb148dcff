"""Vectors, ids and codes on disk, and files that survive a crash."""
