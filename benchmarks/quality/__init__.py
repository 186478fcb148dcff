"""Labelled Recall@10 of bundles and baselines, and what settings do to it."""
