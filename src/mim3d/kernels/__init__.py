"""Hot operations written for the hardware: depth-wise convolution of whole volumes and of visible blocks alone."""
