"""Scans in and out of files: NIfTI, NRRD, MetaImage, DICOM series and image stacks, with their grids."""
