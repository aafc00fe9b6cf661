"""Trained networks for use elsewhere: Hugging Face folders, ONNX, torch.export programs and MONAI bundles."""
