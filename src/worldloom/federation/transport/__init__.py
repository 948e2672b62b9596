"""How messages travel between a coordinator and its nodes."""
