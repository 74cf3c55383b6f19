"""Communities of a graph."""
