"""What ranks share: groups, layouts, collectives, and the scans of memory states over ranks."""
