"""NAR files on their way in, verified while they come, and published."""
