"""Report of a study of policies that were trained against judges."""
