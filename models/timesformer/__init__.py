"""TimeSformer and its five schemes of space-time attention.

In reading order: ``model`` (the network and its variants), ``attention`` (the five schemes and the block),
``rollout`` (where the CLS token looks), ``weights`` (from other projects' files), ``huggingface`` (to Hugging Face's
format).
"""
