"""Pure data that every other package speaks: no torch, no devices, no side effects."""
