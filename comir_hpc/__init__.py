"""comir-hpc: registration of 3D volumes of different modality through learned representations."""

__version__ = "0.1.0"
