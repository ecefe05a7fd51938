"""Shards built: plan, units of work, engines, finalizing, verifying."""
