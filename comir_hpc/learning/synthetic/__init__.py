"""Make pairs of views to learn from where there is no aligned pair: one random geometry, two random contrasts.

An encoder that is trained on such pairs cannot learn any contrast. It learns what stays when the contrast changes, so
it can be used on volumes of modalities that it has never seen (docs/general.md).

==============  ============================================================
`fields`        turned and bent points, smooth noise, nearest seeds
`anatomies`     label images of many kinds
`textures`      real volumes, whose anatomy is lent
`contrasts`     two appearances of one anatomy, spoiled as scanners spoil
`sampler`       the pairs of a training step
==============  ============================================================
"""
