"""Value objects, protocols, configuration, errors, seeds and files: what every room may use."""
