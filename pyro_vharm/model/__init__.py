"""Pyro callables and data become plain functions of tensors; the only place that reads traces."""
