"""Memory outside the mixers: three levers on a model, in any combination (docs/memory.md)."""
