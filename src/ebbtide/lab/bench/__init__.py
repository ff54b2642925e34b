"""How fast a step is, beside torch and every peer that is installed, on this machine."""
