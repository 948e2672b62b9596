"""Privacy: clipping and noise, and sums under secure aggregation."""
