"""Row layouts of instruction data, and how each becomes conversations."""
