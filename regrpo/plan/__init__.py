"""What a run would need in memory and FLOPs, from its configuration: ``regrpo plan``."""
