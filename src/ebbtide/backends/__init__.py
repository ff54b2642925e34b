"""Who does the arithmetic: the compiled core, Triton, torch operations, or the reference."""
