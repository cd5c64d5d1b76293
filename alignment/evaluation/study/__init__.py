"""A study of policies that were trained against judges: read, measured, drawn and told."""
