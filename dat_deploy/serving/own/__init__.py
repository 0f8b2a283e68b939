"""A server of our own, on Ray Serve."""
