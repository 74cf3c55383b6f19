"""Mixins and LightningModules, one file per method."""
