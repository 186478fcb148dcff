"""Which release answers, and the live writes to it."""
