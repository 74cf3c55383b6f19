"""Loops around Trainers: methods that learn from many runs, a file a method."""
