"""Paceline: plan, prove, train, checkpoint and serve large models in parallel, on one plan file."""

from __future__ import annotations

__version__ = "0.1.0"
