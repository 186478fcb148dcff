"""Releases on disk: manifest, store, verification, comparison, and their live log."""
