"""Executors: what computes a step."""
