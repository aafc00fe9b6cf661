"""What mim3d is measured against, and how."""
