"""Other libraries' names, argument orders and defaults on top of dcnlib; each imports torch.

`mmcv`      the deformable convolutions and RoI pooling of ``mmcv.ops``
`paddle`    ``paddle.vision.ops.deform_conv2d`` and ``DeformConv2D``
"""
