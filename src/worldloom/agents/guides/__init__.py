"""Guides: subgoals on the way to far goals."""
