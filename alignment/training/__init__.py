"""Training runs of judges and policies: flags, engines, directories, the loop."""
