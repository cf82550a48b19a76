"""Methods that turn the densities of units into weighted particles, and these into log evidence."""
