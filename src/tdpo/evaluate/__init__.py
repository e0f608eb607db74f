"""Metrics of a trained policy: preferences, samples, divergence."""
