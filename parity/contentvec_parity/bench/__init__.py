"""Speed and memory, beside the originals."""
