"""The comparison: stages, metrics, tensors, verdict."""
