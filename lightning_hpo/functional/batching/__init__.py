"""How many samples an optimizer step should use, and what follows for the learning rate."""
