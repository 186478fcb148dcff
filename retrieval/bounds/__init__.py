"""Bounds on one call: bytes and fields of its message, and its time in threads."""
