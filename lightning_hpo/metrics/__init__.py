"""Metrics of torchmetrics' kind that it does not have, a file a method."""
