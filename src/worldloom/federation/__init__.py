"""Federation (Tapestry): many owners weave one shared world model, and keep what is theirs."""
