"""`python -m jaxtune.plan`: the very update of a run, compiled for accelerators that are not here."""
