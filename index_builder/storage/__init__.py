"""Vectors, ids and the arrays of the compiled engine on disk, and files that survive a crash."""
