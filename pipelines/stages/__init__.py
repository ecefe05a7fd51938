"""The stages of training, one class for each objective. In reading order:

* ``run``: how every stage is run, and the tables of stages and objectives
* ``starting_weights``: where a network's weights come from, and which of them training leaves alone
* ``classification``: pretrain with labels, and finetune
* ``forecast``: pretrain by predicting frames
* ``masked``: pretrain by predicting the pixels of hidden tokens
* ``latent``: pretrain by predicting a teacher's features of hidden tokens
* ``distil``: pretrain by learning image teachers' features, token by token
* ``transfer``: 2D to 3D, with ``matching`` (pairs and their metrics), ``feature_targets`` (the teacher's features as
  the target) and ``teacher`` (its features, computed once)
* ``checkpoint_export``: a checkpoint's weights as an export folder
"""
