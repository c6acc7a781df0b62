"""What an evaluation leaves to read: table.md and report.html."""
