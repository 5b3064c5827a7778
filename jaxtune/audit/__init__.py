"""The audit: a configuration's data read as training reads it, and everything about it shown."""
