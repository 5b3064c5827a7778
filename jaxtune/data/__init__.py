"""From files to batches: records, sources, formats, templates, mixture, packing, loader. Numpy only, no jax."""
