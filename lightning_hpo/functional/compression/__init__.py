"""Methods that make a network cheaper."""
