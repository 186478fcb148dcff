"""Trained towers at work: batch embedding, the signal store and ONNX forms."""
