"""Vectors to releases: exact and approximate indexes, calibration, filters, the release format and the live log."""
