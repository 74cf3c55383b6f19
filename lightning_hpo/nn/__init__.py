"""Layers that methods need."""
