"""Training, encoding and log pipeline throughput."""
