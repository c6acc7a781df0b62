"""`python -m llmshrink` is `llmshrink`."""

import os
import sys

if __name__ == "__main__":
    # -m puts the current folder first among the places of modules: a torch.py there isn't torch. A checkout's own root
    # stays, where nothing may be installed.
    if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()] != [os.path.dirname(os.path.dirname(__file__))]:
        del sys.path[0]
    from llmshrink.cli import main

    main()
