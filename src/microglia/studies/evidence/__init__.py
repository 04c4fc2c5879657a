"""Evidence: comparisons over several studies, run by a queue without watching, and one page of statements and outcomes."""
