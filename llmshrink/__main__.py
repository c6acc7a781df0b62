"""`python -m llmshrink` is `llmshrink`."""

from llmshrink.cli import main

if __name__ == "__main__":
    main()
