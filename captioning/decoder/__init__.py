"""What model.py is built from, and beam search."""
