"""Tensor parallelism: matrices split over the `tp` axis."""
