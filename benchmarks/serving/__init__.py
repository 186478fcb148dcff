"""Benchmarks of the service beside its peers."""
