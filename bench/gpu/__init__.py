"""What ``python -m bench.gpu_check`` runs on a card: its parts, the checks they make, and the report."""
