"""Statistics of verdicts: agreement between judges, bootstrap intervals and Bradley-Terry fits."""
