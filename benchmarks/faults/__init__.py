"""Faults under load: swaps, kills, overload, storms, malformed requests, damaged files."""
