"""Judge kinds: each is a configuration and the judge that it opens."""
