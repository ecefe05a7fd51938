"""Convolutional recurrent networks and the forecaster built from them."""
