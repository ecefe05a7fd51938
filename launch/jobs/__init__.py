"""Jobs for schedulers: Slurm scripts and Kubernetes manifests."""
