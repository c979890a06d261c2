"Programs of measured processes. A peer's driver is a script of the peer's Python, where this folder is the first path."
