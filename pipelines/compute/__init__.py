"""How the passes of a network are run: the same numbers in less memory, or in less time.

In reading order: ``recompute`` (activations that the backward pass computes again), ``compiled`` (``torch.compile``).
"""
