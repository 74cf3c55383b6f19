"""The one implementation of each method inside a training loop, one file per method."""
