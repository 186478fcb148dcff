"""Releases at a URL: pushed, pulled and collected; only blocks that are not there yet move."""
