"""Extension points of other libraries: each package here is imported by its name."""
