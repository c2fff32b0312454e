"""The commands: one file a verb. Whatever is slow to import is imported when a verb runs."""
