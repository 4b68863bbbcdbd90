"""Captions of the user's own images, and captions.jsonl."""
