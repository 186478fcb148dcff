"""Tables to batches: pairs, sampling, cross-fitting and sketches."""
