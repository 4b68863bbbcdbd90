"""From images through the CNN to features, one .npy each."""
