"""Searching one space with vectors of another: declaration, adapter and measurement."""
