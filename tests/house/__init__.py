"""The repository itself: README, Makefile, benchmark programs."""
