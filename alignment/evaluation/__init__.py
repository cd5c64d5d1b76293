"""How good policies are, by their responses and by what their training left behind."""
