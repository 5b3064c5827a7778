"""Rows by index, wherever they are stored."""
