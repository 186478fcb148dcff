"""Filter expressions, attribute columns and the rows that pass."""
