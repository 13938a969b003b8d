"""Runs the original and the port, compares them, and reports how far apart they are."""
