"""Which tables a run uses: the dataset, loaders, importers of public data, related queries."""
