"""The stages of training, one class an objective."""
