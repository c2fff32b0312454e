"""Certified exact: a plan's gradients and weights against one process in float64."""
