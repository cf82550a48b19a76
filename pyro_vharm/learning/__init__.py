"""Learners: refitting a guide per unit, reference parameters, and the recorder of a training."""
