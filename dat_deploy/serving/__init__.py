"""Engines on inference servers: repositories for Triton Inference Server, and a server of our own on Ray Serve."""
