"""The made videos of the demo."""
