"""Derivatives of solutions: implicit differentiation, its linear solvers, and the hypergradients built on them."""
