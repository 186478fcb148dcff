"""gRPC over HTTP/2 for the hot path: one protocol object per connection, no task and no copy where an answer is ready at once."""
