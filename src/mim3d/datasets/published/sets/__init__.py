"""One file for each published data set: its labels, settings, names of files and folds."""
