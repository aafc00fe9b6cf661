"""Plans of data sets that nobody described: measurements, rules and their reasons."""
