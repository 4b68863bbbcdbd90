"""The sizes of InceptionV3: what it takes and what it gives."""

IMAGE_SIZE = 299  # pixels: InceptionV3 takes squares with sides of this length

LOCATIONS, CHANNELS = 64, 2048  # P and F: InceptionV3's last grid, 8x8 locations, row by row
