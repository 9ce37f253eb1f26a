"""`python -m carv_attrib` is the command `carv-attrib`."""

from carv_attrib.cli import main

if __name__ == "__main__":
    main(prog_name="carv-attrib")
