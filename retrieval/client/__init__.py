"""Typed clients, sync and async, with retries and typed errors."""
