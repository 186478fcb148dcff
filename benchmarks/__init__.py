"""Claims to evidence: each module is one ``omni bench`` command that writes a JSON record and prints a table."""
