"""Planning of training for a data set: measurements, rules and the reasons of each choice."""
