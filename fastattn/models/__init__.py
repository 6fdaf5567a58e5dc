"""The Llama-family decoder: reading checkpoints, running the model, generating text."""
