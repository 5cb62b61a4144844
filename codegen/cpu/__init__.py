"""CPU executors: C with explicit SIMD, built with the system's compiler, loaded with ctypes."""
