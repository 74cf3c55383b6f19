"""Tiny modules, tiny data and runners for testing a LightningModule with a method."""
