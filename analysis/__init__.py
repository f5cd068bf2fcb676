"""What a search found, from its records and stored predictions alone: no torch, no ray, no checkpoint."""
