"""A 2D network on every frame, then pooling, attention or an LSTM over time."""
