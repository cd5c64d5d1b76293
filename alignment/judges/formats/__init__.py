"""Judge formats: the prompt template of a judge and the parser of its answer."""
