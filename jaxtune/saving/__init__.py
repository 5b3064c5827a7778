"""What a run keeps to go on from: checkpoints in storage, copies on hosts' own disks, and what is believed of both."""
