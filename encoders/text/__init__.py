"""One normal form, one word splitter, hashing, n-grams and vocabularies of text."""
