"""Other projects' models on our layers."""
