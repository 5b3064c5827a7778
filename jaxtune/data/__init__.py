"""From files to batches: records, sources, formats, templates, mixture, packing, windows, stream, loader. No jax."""
