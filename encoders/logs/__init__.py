"""Logs to training pairs, here or on Ray, and a simulator of logs."""
