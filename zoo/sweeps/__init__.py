"""Many runs: grids, local processes, clusters."""
