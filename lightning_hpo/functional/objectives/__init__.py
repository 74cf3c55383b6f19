"""Metrics as losses."""
