"""What every room stands on: errors, settings, files, run folders, progress and resources."""
