"Programs of measured processes. A peer's driver runs as a script in the peer's Python, where this folder is its first path."
