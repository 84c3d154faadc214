"""fastattn.jax: needs JAX."""
