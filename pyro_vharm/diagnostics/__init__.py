"""From numbers to answers: the inference gap, learning harm, and a verdict."""
