"""Rounds, plain or under secure aggregation: the coordinator, the nodes, and what passes between them."""
