"""The records of a consortium: signed messages, the ledger and its history."""
