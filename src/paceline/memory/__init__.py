"""What is kept in memory, and what is not."""
