"""Small LightningModules and data modules on real data, for examples, docs and tests."""
