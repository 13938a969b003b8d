"""The subcommands of proof and publishing, one file each."""
