"""Foreign models, made sequence-parallel from outside."""
