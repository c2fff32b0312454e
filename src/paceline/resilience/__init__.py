"""Runs that are watched, judged and mended: who hangs, who is slow, and how to go on."""
