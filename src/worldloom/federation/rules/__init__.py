"""The rules that the members of a consortium agree on: constitution, data cards, partition."""
