"""Training: the loop, the step, and what is trained for."""
