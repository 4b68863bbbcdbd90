"""BLEU, METEOR and CIDEr of captions, and whether attention falls on what they name."""
