"""Search of one entity type: index, plans, live entries, calibration and explanations."""
