"""What one device computes: recurrences chunk by chunk, and the affine map of a stretch of tokens."""
