"""Shards opened for reading: bytes by offset, datasets and subsets, the contact sheet."""
