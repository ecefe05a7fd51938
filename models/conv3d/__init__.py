"""3D convolutional networks: clips to features or logits."""
