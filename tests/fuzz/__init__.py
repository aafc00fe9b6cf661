"""Damaged files of every format that mim3d reads: each must be read, or refused in a sentence that names it."""
