"""What texts say about themselves: kinds, scores, languages, duplicates; nothing here knows a token."""
