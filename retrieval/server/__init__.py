"""The server process, its supervisor and its workers."""
