"""What the records say: who stands where, what counts, what is still to be run."""
