"""What a run leaves for people and programs: report.json, the card, the log."""
