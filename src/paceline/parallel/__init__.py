"""How a model is laid over ranks, applied to a plain model from outside."""
