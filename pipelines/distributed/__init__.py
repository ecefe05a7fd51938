"""Ranks: who they are, how they talk, and that they agree."""
