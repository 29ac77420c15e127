"""ReGRPO: a compact trainer for tool-using agents that reflect on a failed call and recover."""

__version__ = "0.1.0"
