"""Repositories for Triton Inference Server, and how it is started."""
