"""Schema changes of the index."""
