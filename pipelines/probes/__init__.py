"""Features judged while they are learned, by what the loss does not say.

* ``pooled``: one vector a clip, by k-NN and a linear classifier
"""
