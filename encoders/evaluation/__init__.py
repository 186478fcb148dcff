"""Exact ranking, metrics, slices, baselines and the evaluation report."""
