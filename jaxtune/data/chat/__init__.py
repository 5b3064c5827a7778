"""Conversations rendered once into tokens with one weight each."""
