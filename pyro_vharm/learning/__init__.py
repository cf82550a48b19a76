"""Learners: refitting a guide per unit, and reference parameters."""
