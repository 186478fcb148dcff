"""Text to vectors: features, query and entity towers, loss, training, evaluation and batch inference."""
