"""The commands ``omni data|enrich|pairs|train|evaluate|embed|export`` and what they print."""
