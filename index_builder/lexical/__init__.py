"""The lexical leg of retrieval: BM25 over words and character n-grams."""
