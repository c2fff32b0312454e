"""Text in, batches out. The order of data is a function of (seed, step), never of the layout."""
