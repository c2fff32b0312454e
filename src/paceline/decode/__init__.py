"""From logits to text: caches, samplers, stop strings."""
