"""What a table is: schemas, files, checks, cells, streams and profiles."""
