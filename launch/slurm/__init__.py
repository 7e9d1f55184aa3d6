"""How one training becomes a job of SLURM: what is asked for, the runs it is, the script, its submission."""
