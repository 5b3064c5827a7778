"""Tasks worded by many templates, alone or after exemplars."""
