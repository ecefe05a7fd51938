"""Features judged while they are learned, by what the loss does not say.

* ``collapse``: do they still tell clips apart?
* ``attentive``: all tokens of a clip, by a grid of small transformers
* ``pooled``: one vector a clip, by k-NN and a linear classifier; runs every probe a config asks for
"""
