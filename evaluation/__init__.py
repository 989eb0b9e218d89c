"""How samples are compared with images."""
