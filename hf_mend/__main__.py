"""`python -m hf_mend` is `hf-mend`."""

from .cli import main


if __name__ == "__main__":
    main()
