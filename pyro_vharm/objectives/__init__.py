"""Pyro ELBO subclasses that train with something better than the ELBO."""
