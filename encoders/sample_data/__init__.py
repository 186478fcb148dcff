"""The sample data: entities, pairs and pictures as gzipped JSON lines, with their licences."""
