"""``mlx-contentvec extract``: features of a folder of audio files."""
