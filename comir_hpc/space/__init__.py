"""Space, in pure numpy: grids in the world, boxes of voxels, blocks, rotations and the groups of a voxel grid."""
