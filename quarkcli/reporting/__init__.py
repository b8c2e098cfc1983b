"""The records of a run for people and programs: report.json, the card, the log."""
