"""Which source is drawn when: trees of sources, their shares, the draws and the plan."""
