"""Value objects, interfaces, configuration, errors, seeds and files, which every package may use."""
