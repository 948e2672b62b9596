"""Training rounds, with or without secure aggregation: coordinator, nodes, and their messages."""
