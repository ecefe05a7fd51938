"""3D convolutional networks: clips to features or logits. Each file stands beside its paper.

In reading order: ``c3d``; residual networks: ``resnet3d``, ``r2plus1d``, ``resnext3d``, ``p3d``, ``p3d_resnet``,
``slowfast``; densely connected ones: ``densenet3d``, then ``t3d``; Inception: ``i3d``, ``inception3d``; and
``efficientnet_lite_tam``, an image network with temporal aggregation between its blocks.
"""
