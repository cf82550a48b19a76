"""Results as DataTrees, and figures drawn from a DataTree alone."""
