"""Compute graphs of the supported model families, as functions of a ModelConfig."""
