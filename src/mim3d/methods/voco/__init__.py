"""VoCo, volume contrast."""
