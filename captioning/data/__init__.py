"""Captioned images: readers of the files that people have."""
