"""Ranks: how they start, find each other, and talk."""
