"""The tile-level IR: types, schedule, format protocol, text form, verifier. Knows nobody."""
