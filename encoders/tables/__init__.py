"""What a table is: schemas, files, checks, cell types, streams and profiles."""
