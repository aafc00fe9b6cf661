"""Pre-training of SwinUNETR."""
