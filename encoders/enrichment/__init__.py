"""Entity texts from elsewhere: board titles, engaged queries and captions."""
