"""The commands ``omni rebuild|update|release|explain``."""
