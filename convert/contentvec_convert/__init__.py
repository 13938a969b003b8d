"""Checkpoint in, safetensors out, every tensor accounted for."""
