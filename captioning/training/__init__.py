"""Batches, optimizer, checkpoints, and self-critical epochs."""
