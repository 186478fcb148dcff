"""The query tower, the entity tower and the bundle that holds both."""
