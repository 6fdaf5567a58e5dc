"""One adapter a file: each exposes ``BACKEND``, and imports its toolkit only when asked if it is usable."""
