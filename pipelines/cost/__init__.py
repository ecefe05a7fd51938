"""What a run will cost: memory, step time, loading speed."""
