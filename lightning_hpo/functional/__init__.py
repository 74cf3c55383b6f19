"""The mathematics of each method as plain functions of tensors; needs torch and nothing else."""
