"""Objectives: what a batch's loss is."""
