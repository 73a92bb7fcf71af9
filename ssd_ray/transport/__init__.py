"""The channel between drafts and target: its contract and its implementations."""
