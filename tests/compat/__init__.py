"""fastattn.compat."""
