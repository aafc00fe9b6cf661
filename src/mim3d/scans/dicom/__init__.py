"""DICOM: series found by their headers, stacked and read; label maps written as DICOM Segmentation."""
