"""Metrics, tracing, logs, shadow recall and the impression log."""
