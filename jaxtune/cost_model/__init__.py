"""What a compiled step costs on hardware that is not here: cycles, bytes, links."""
