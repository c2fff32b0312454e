"""Saved state: written whole, committed by one rename, checked before it is used."""
