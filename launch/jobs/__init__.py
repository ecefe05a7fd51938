"""Jobs for schedulers.

In reading order: ``plan`` (the jobs of one or several configs, and their order), ``fabric`` (the network between
nodes), ``slurm`` (sbatch scripts), ``kubernetes`` (manifests).
"""
