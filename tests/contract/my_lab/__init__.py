"""What a laboratory writes for itself: a backbone, two methods, tasks and a preset, without an edit in mim3d."""
