"""What can be compared: several ways to see a volume, with one interface.

A registration compares two volumes as a `Representation` shows them: a few channels on a grid, at one level of a
pyramid. A representation also says how alike two of them are (`Measure`), and what an agreement may be held against.

=============  ===========================================================================
`protocol`     `Representation`: what every way to see a volume can do
`measures`     `Measure`: scores, criterion of the search, metric of the refinement
`features`     `Features`: channels, mask and grid; where the specimen is
`learned`      encoders of a training run, evaluated here
`working`      the grids that encoders see a pair on
`stored`       representations that `comir-hpc infer` wrote
`trained`      what those two have in common
`intensity`    intensities, by mutual information
`mind`         self-similarities (MIND-SSC), by correlation
`gradient`     normalised gradient magnitudes, by correlation
`isotropic`    thick slices on nearly cubic voxels
`criteria`     two maps compared at all shifts by FFT
`encoding`     an encoder slid over a volume in windows
=============  ===========================================================================

`reference`, `quality`, `equivariance` (with `turning`) and `seams` measure what encoders and their maps can do.

Adding one
----------
A new representation is one file with one class, and one line in ``REPRESENTATIONS`` of `comir_hpc.config.words`:

>>> @dataclass(frozen=True, eq=False)
... class Edges(Representation):
...     measure: ClassVar[Measure] = CORRELATION
...
...     def values(self, level, image):
...         return gaussian_gradient_magnitude(image, 1.0)[None]

>>> REPRESENTATIONS["edges"] = Offered("comir_hpc.representations.edges:Edges")

``comir-hpc register --representation edges`` then does everything that it does with the others.
``tests/test_representation_door.py`` registers a pair with such a class. What else a class may say has a default in
`Representation`:

* `num_channels`, if there are several. Memory is predicted from it, and from `working_bytes` if making the values needs
  more.
* `from_settings` opens models and files; `identity` names them in the fingerprint of the result, and `provenance` in
  the result itself.
* `levels` and `place`, if only some levels can be used, or if the volume is seen on another grid than its own.
  `features` is called for any of `levels`, so a map can be made at its own scale instead of being averaged down.
* `learned` and `reference`, if a right answer is known to reach a certain agreement. The verdict is at best WARN until
  its calibration has rows of the representation (``benchmarks/verdict``).
* `mirror_blind`, if a mirrored volume has other values than the mirrored ones.
* `searched_levels`, if the global search shall look at features that were made at coarser levels.
* ``Features.describe``, if the channels look along the axes of the grid, so that a volume has to be turned before it is
  described (`mind`).
* `measure` may be a new `Measure`: a score, a criterion and a metric.
"""

from __future__ import annotations

from importlib import import_module

from comir_hpc.config.register import RegisterSettings
from comir_hpc.config.words import REPRESENTATIONS
from comir_hpc.representations.features import Features, one_channel, specimen_mask
from comir_hpc.representations.measures import CORRELATION, INFORMATION, Agreement, Measure
from comir_hpc.representations.protocol import Representation, Role
from comir_hpc.volumes.volume import Volume

__all__ = [
    "CORRELATION",
    "INFORMATION",
    "REPRESENTATIONS",
    "Agreement",
    "Features",
    "Measure",
    "Representation",
    "Role",
    "one_channel",
    "open_representation",
    "specimen_mask",
]


def open_representation(
    volume: Volume, settings: RegisterSettings, role: Role, partner: Volume
) -> Representation:
    """Open the representation of one volume that the settings ask for; `partner` is the other volume.

    Raises
    ------
    VolumeError, CheckpointError, RegistrationError
        If a file or a model that it needs does not fit the volume.
    """
    module, name = REPRESENTATIONS[settings.representation].place.split(":")
    kind: type[Representation] = getattr(import_module(module), name)
    return kind.from_settings(volume, settings, role, partner)
