"""What the program stands on and what knows nothing of captions: errors, processes, command line, files, downloads."""
