"""A complete RLHF run in minutes on a CPU: a toy review language with a known true reward."""
