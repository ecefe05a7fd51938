"""For a notebook or a script, as ``import cliplift as cl`` gives it. In reading order:

* ``processor``: a video to the clips that a network takes
* ``model``: a trained network that predicts, gives features and explains
* ``clips``: the clips of shards as a dataset of PyTorch
"""
