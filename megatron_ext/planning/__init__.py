"""Plans of a run before it starts: layout, dry run and preflight."""
