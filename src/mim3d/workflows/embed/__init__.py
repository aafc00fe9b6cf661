"""Features of many scans: settings, regions of scans, what is kept of a run, and the loop over scans."""
