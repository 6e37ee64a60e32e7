"""The delta family: a memory that erases what a key held before it writes there."""
