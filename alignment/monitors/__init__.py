"""Detection of reward hacking in the text of responses."""
