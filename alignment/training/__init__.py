"""Training runs of judges and policies: the loop, run directories and settings."""
