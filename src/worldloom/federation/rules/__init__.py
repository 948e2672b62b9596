"""What the members of a consortium agreed on: constitution, data cards, partition."""
