"""The fourteen tools of GTA: what they take, and where what they give comes from."""
