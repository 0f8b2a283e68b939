"""Engines of TensorRT and TensorRT-RTX: built, looked into, run."""
