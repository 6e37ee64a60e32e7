"""Data: documents, their tokens on disk, the rows that they are packed into, and the batches of a step."""
