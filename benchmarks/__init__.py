"""Programs that measure groundup beside its peers: each runs both in turn on this machine and prints ratios of medians."""
