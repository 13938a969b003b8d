"""``python -m mlx_contentvec`` is ``mlx-contentvec``."""

from .cli import main

main(prog_name="mlx-contentvec")
