"""`python -m mmseqrec`: the command line of page 81 (written by hand, since nbdev exports no `__main__`)."""
import sys

from mmseqrec.app.cli import main

if __name__ == "__main__": sys.exit(main())
