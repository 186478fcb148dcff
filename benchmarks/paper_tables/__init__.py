"""The paper's tables and its design questions on public data."""
