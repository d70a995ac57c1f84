"""What a run looked like, read back from its manifests."""
