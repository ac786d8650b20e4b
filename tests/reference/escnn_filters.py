"""Make escnn_filters.npz: filters of escnn's octahedral group convolutions, which ours must be able to express.

    python3.11 -m venv ESCNN
    ESCNN/bin/pip install "numpy<2" scipy torch==2.13.0 lie_learn py3nj escnn==1.0.11    # needs gfortran
    ESCNN/bin/python tests/reference/escnn_filters.py tests/reference/escnn_filters.npz

escnn (Cesa, Lang and Weiler 2022) builds its filters from harmonics on rings, ours from permuted taps; what both must
satisfy is the same. It needs a Fortran compiler and an old numpy, so its filters are kept and not made in the tests.
"""

import sys

import numpy as np
import torch
from escnn import gspaces, nn


def main() -> None:
    """Write filters with random weights, and the rotations in the order of their channels."""
    torch.manual_seed(0)
    space = gspaces.octaOnR3()
    image = nn.FieldType(space, [space.trivial_repr])
    fields = nn.FieldType(space, [space.regular_repr])
    lifting = nn.R3Conv(image, fields, kernel_size=3, bias=False)
    group = nn.R3Conv(fields, fields, kernel_size=3, bias=False)
    x = torch.randn(1, 1, 5, 6, 7)
    with torch.no_grad():
        np.savez_compressed(
            sys.argv[1],
            rotations_xyz=np.stack([g.to("MAT") for g in space.fibergroup.elements]).astype(np.float64),
            lifting=lifting.expand_parameters()[0].numpy(),
            group=group.expand_parameters()[0].numpy(),
            image=x.numpy(),
            lifted=lifting(image(x)).tensor.numpy(),
            convolved=group(lifting(image(x))).tensor.numpy(),
        )


if __name__ == "__main__":
    main()
