"""Late temporal modelling: a 3D backbone, its feature map kept in time, BERT or pooling over it.

In reading order: ``model`` (backbone, reduction, head and classifier), ``reduction`` (FRMB and FRAB), ``heads`` (six
ways to put time together), ``bert`` (one of them), ``variants`` (the published networks by name), ``weights`` (whose
file fits which part).
"""
