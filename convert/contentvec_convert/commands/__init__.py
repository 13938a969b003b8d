"""The converter's subcommands, one file each."""
