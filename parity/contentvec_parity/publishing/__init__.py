"""Weights with their evidence: package, card, publish, verify."""
