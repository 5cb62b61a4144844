"""The Gluon dialect of the Triton backend: tiles on NVIDIA tensor cores, in register order."""
