"""Privacy mechanisms that are independent of a consortium: clipping and noise, and secure aggregation of sums."""
