"""Mechanisms of privacy that know no consortium: clipping and noise, and sums under secure aggregation."""
