"""Records a run for people and programs: report.json, the card, the log."""
