"""Forms in which other tools keep transforms: each is written and read here, and nowhere else.

==============  =========================================================================================
`grids`         `GridPair`, and the worlds of other tools as matrices
`matrices`      a matrix in text: RAS, LPS, or FSL's
`lta`           FreeSurfer's LTA files
`elastix`       elastix's parameter files, one for each part
`ngff`          scenes of OME-NGFF 0.6; `ngff_fields` keeps displacement fields in them
`exported`      one transform written in any of these forms
==============  =========================================================================================

A reader takes a path and gives a `PointMap` from fixed to moving points in LPS and mm. What a form cannot hold is
refused with the number and the kind of the part.
"""
