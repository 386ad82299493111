"""Outside the training process: membership, policy, and the loop that supervises one job."""
