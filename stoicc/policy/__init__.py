"""The budget policy: which format each tile gets under a bound on bytes, time or error."""
