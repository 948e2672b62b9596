"""What a consortium leaves behind: signed messages, the ledger, its history."""
