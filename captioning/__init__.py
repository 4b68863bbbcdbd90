"""What the three scripts are built on: reading captions and images, features, decoding, scores and files of results."""
