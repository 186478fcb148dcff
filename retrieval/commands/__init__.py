"""The commands ``omni serve`` and ``omni query``."""
