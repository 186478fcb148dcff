"""The settings of a training run: TOML files as checked dataclasses."""
