"""2D image networks: the teachers and frame encoders."""
