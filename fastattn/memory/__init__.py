"""KV caches and, later, where weights live."""
