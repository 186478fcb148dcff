"""``omni demo``: train, evaluate, build, serve and query the sample data."""
