"""The demo data set, which the project draws itself; a reader of the real thing can skip it."""
