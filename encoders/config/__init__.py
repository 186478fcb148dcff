"""What a run can be told: TOML files as checked dataclasses."""
