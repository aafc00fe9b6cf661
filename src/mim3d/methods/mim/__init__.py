"""MiM, Mask in Mask."""
