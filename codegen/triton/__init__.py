"""The Triton backend, portable dialect: one emitted Python module per kernel class."""
