"""Backends: from a scheduled module to an executor. Knows only `stoicc.ir`."""
