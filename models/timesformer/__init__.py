"""TimeSformer and its five schemes of space-time attention."""
