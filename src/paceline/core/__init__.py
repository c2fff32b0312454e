"""What every other package stands on. No torch, and nothing of ours above it."""
