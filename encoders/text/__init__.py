"""Normal forms, hashing, n-grams and vocabularies of text."""
