"""Rounds: the coordinator, the nodes, and what passes between them."""
